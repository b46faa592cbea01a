# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Builds the Lightning trainer of a script, on GPUs or on CPU processes."""

from datetime import timedelta

import torch
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_ee.errors import ConfigError, Fault
from nemo_ee.models.checks.batch_checks import validation_faults, validation_interval
from nemo_ee.models.checks.key_rules import CHECKPOINTS, TRAINER, key_faults
from nemo_ee.models.checks.launch_checks import check_launch, slurm_environment
from nemo_ee.models.grad_scaler import EarlyExitGradScaler
from nemo_ee.models.strategy import EarlyExitDDPStrategy

TIMEOUT_MINUTES = 30.0
"""How long a collective waits for the other ranks unless `model.distributed_timeout_minutes` says otherwise:
torch's own limit on a CPU, Lightning's everywhere."""


class EarlyExitTrainerBuilder(MegatronTrainerBuilder):
    """`MegatronTrainerBuilder` that also builds trainers for CPU processes (gloo).

    Raises:
        ConfigError: trainer settings that this machine, or the processes started for it, cannot run.
    """

    def _training_strategy(self) -> EarlyExitDDPStrategy:
        return EarlyExitDDPStrategy(
            no_ddp_communication_hook=True,
            find_unused_parameters=False,
            nccl_communicator_config_path=self.cfg.model.get("nccl_communicator_config_path"),
            sharp=self.cfg.model.get("sharp", False),
            dist_ckpt_parallel_save=self.cfg.model.get("dist_ckpt_parallel_dist_opt", True),
            process_group_backend="nccl" if torch.cuda.is_available() else "gloo",
            timeout=timedelta(minutes=self.cfg.model.get("distributed_timeout_minutes") or TIMEOUT_MINUTES),
        )

    def _grad_scaler(self) -> EarlyExitGradScaler:
        model = self.cfg.model
        return EarlyExitGradScaler(
            init_scale=model.get("native_amp_init_scale", 2**32),
            growth_interval=model.get("native_amp_growth_interval", 1000),
            hysteresis=model.get("hysteresis", 2),
        )

    def _plugins(self) -> list:
        plugins = super()._plugins()
        if (environment := slurm_environment()) is not None and self.cfg.get("cluster_type") != "BCP":
            plugins.append(environment)
        return plugins

    def create_trainer(self, callbacks: list | None = None):
        """The trainer; `trainer.accelerator` may be gpu, cpu or auto."""
        trainer = self.cfg.trainer
        gpu = torch.cuda.is_available()
        faults = _faults(trainer, gpu) + list(validation_faults(trainer, self.cfg.model.get("data")))
        faults += key_faults(trainer, TRAINER, "trainer")
        checkpoints = "exp_manager.checkpoint_callback_params"
        if (section := OmegaConf.select(self.cfg, checkpoints)) is not None:
            faults += key_faults(section, CHECKPOINTS, checkpoints)
        limit = self.cfg.model.get("distributed_timeout_minutes")
        if limit is not None and (not isinstance(limit, int | float) or limit <= 0):
            rule, remedy = "must be a number of minutes above 0", f"use e.g. {TIMEOUT_MINUTES:g}, or null"
            faults.append(Fault("model.distributed_timeout_minutes", limit, rule, remedy))
        if faults:
            raise ConfigError(*faults)
        with open_dict(self.cfg):
            trainer.accelerator = "gpu" if gpu else "cpu"
            trainer.inference_mode = False
            if isinstance(trainer.get("val_check_interval"), float):
                trainer.val_check_interval = validation_interval(trainer)
            if (
                self.cfg.get("exp_manager") is not None
                and "log_tflops_per_sec_per_gpu" not in self.cfg.exp_manager
            ):
                self.cfg.exp_manager.log_tflops_per_sec_per_gpu = False
        OmegaConf.resolve(self.cfg)
        built = super().create_trainer(callbacks)
        check_launch(built)
        return built


def _faults(trainer: DictConfig, gpu: bool) -> list[Fault]:
    faults, accelerator = [], trainer.get("accelerator", "auto")
    if accelerator == "gpu" and not gpu:
        faults.append(Fault("trainer.accelerator", "gpu", "there is no GPU here", "use auto or cpu"))
    if accelerator == "cpu" and gpu:
        rule = "Megatron's modules would still use the GPU that is here"
        faults.append(
            Fault("trainer.accelerator", "cpu", rule, "hide it with CUDA_VISIBLE_DEVICES= or use auto")
        )
    if str(trainer.get("precision", 32)) in ("16", "16-mixed") and not gpu:
        faults.append(
            Fault("trainer.precision", trainer.precision, "half precision needs a GPU", "use bf16 or 32")
        )
    if trainer.get("inference_mode", False):
        rule = "what Megatron's rotary embedding keeps from validation would break the next training step"
        faults.append(Fault("trainer.inference_mode", True, rule, "set it to false"))
    return faults
