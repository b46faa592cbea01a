# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Builds the Lightning trainer of a script, on GPUs or on CPU processes."""

import torch
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from omegaconf import OmegaConf, open_dict

from nemo_ee.errors import ConfigError, Fault
from nemo_ee.models.strategy import EarlyExitDDPStrategy


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

    def create_trainer(self, callbacks: list | None = None):
        """The trainer; `trainer.accelerator` may be gpu, cpu or auto."""
        trainer = self.cfg.trainer
        gpu = torch.cuda.is_available()
        if trainer.get("accelerator", "auto") == "gpu" and not gpu:
            raise ConfigError(Fault("trainer.accelerator", "gpu", "there is no GPU here", "use auto or cpu"))
        if str(trainer.get("precision", 32)) in ("16", "16-mixed") and not gpu:
            rule = "half precision needs a GPU"
            raise ConfigError(Fault("trainer.precision", trainer.precision, rule, "use bf16 or 32"))
        with open_dict(self.cfg):
            trainer.accelerator = "gpu" if gpu else "cpu"
            if (
                self.cfg.get("exp_manager") is not None
                and "log_tflops_per_sec_per_gpu" not in self.cfg.exp_manager
            ):
                self.cfg.exp_manager.log_tflops_per_sec_per_gpu = False
        OmegaConf.resolve(self.cfg)
        return super().create_trainer(callbacks)
