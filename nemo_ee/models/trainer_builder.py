# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Builds the Lightning trainer of a script, on GPUs or on CPU processes."""

import torch
from nemo.collections.nlp.parts import nlp_overrides
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_ee.errors import ConfigError, Fault
from nemo_ee.models.grad_scaler import EarlyExitGradScaler
from nemo_ee.models.strategy import EarlyExitDDPStrategy
from nemo_ee.runtime.port import choose_master_port


class EarlyExitTrainerBuilder(MegatronTrainerBuilder):
    """`MegatronTrainerBuilder` that also builds trainers for CPU processes (gloo).

    Raises:
        ConfigError: trainer settings that this machine cannot run.
    """

    def _training_strategy(self) -> EarlyExitDDPStrategy:
        return EarlyExitDDPStrategy(
            no_ddp_communication_hook=True,
            find_unused_parameters=False,
            nccl_communicator_config_path=self.cfg.model.get("nccl_communicator_config_path"),
            sharp=self.cfg.model.get("sharp", False),
            dist_ckpt_parallel_save=self.cfg.model.get("dist_ckpt_parallel_dist_opt", True),
            process_group_backend="nccl" if torch.cuda.is_available() else "gloo",
        )

    def _grad_scaler(self) -> EarlyExitGradScaler:
        model = self.cfg.model
        return EarlyExitGradScaler(
            init_scale=model.get("native_amp_init_scale", 2**32),
            growth_interval=model.get("native_amp_growth_interval", 1000),
            hysteresis=model.get("hysteresis", 2),
        )

    def create_trainer(self, callbacks: list | None = None):
        """The trainer; `trainer.accelerator` may be gpu, cpu or auto."""
        trainer = self.cfg.trainer
        gpu = torch.cuda.is_available()
        if faults := _faults(trainer, gpu):
            raise ConfigError(*faults)
        with open_dict(self.cfg):
            trainer.accelerator = "gpu" if gpu else "cpu"
            trainer.inference_mode = False
            if (
                self.cfg.get("exp_manager") is not None
                and "log_tflops_per_sec_per_gpu" not in self.cfg.exp_manager
            ):
                self.cfg.exp_manager.log_tflops_per_sec_per_gpu = False
        OmegaConf.resolve(self.cfg)
        choose_master_port()
        return super().create_trainer(callbacks)


def _faults(trainer: DictConfig, gpu: bool) -> list[Fault]:
    faults, accelerator = [], trainer.get("accelerator", "auto")
    if accelerator == "gpu" and not gpu:
        faults.append(Fault("trainer.accelerator", "gpu", "there is no GPU here", "use auto or cpu"))
    if accelerator == "cpu" and gpu:
        rule = "Megatron's modules would still use the GPU that is here"
        faults.append(
            Fault("trainer.accelerator", "cpu", rule, "hide it with CUDA_VISIBLE_DEVICES= or use auto")
        )
    elif gpu and not nlp_overrides.HAVE_APEX:
        rule = "on a GPU NeMo's strategies need Apex, which is not installed"
        remedy = "use NVIDIA's NeMo container, install Apex, or run on the CPU with CUDA_VISIBLE_DEVICES="
        faults.append(Fault("trainer.accelerator", accelerator, rule, remedy))
    if str(trainer.get("precision", 32)) in ("16", "16-mixed") and not gpu:
        faults.append(
            Fault("trainer.precision", trainer.precision, "half precision needs a GPU", "use bf16 or 32")
        )
    if trainer.get("inference_mode", False):
        rule = "what Megatron's rotary embedding keeps from validation would break the next training step"
        faults.append(Fault("trainer.inference_mode", True, rule, "set it to false"))
    return faults
