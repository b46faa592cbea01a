# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Models for scripts that only run them, from a base and perhaps exits."""

from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf

from nemo_ee.checkpoint import archive, run_keys
from nemo_ee.checkpoint.exits import adapter
from nemo_ee.config import EarlyExitConfig
from nemo_ee.errors import ConfigError, Fault
from nemo_ee.models.checks.model_checks import from_checkpoint, read_early_exit
from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel


class Source(Protocol):
    """Settings that name a model's files."""

    @property
    def gpt_model_file(self) -> str: ...

    @property
    def adapter_file(self) -> str | None: ...


class Parallel(Protocol):
    """Settings of a script whose model may run in several processes."""

    @property
    def tensor_model_parallel_size(self) -> int: ...

    @property
    def pipeline_model_parallel_size(self) -> int: ...

    @property
    def megatron_amp_O2(self) -> bool: ...


def check_processes(config: Parallel, processes: int) -> None:
    """Raises ConfigError unless there are as many processes as the model runs on."""
    tensor, stages = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    if processes != tensor * stages:
        rule = f"the model runs on {tensor} x {stages} processes (tensor- x pipeline_model_parallel_size)"
        raise ConfigError(Fault("trainer.devices", processes, rule, f"set trainer.devices={tensor * stages}"))


def layout(config: Parallel, trainer: Any) -> dict[str, Any]:
    """Keys of the `model` configuration by which a script lays the model out."""
    return {
        "precision": trainer.precision,
        "tensor_model_parallel_size": config.tensor_model_parallel_size,
        "pipeline_model_parallel_size": config.pipeline_model_parallel_size,
        "megatron_amp_O2": config.megatron_amp_O2,
    }


def read_exits(config: Source) -> tuple[DictConfig, EarlyExitConfig]:
    """The base's own configuration, and the exits of the file that has them.

    Raises:
        CheckpointError: a file cannot be read.
    """
    base = archive.read_config(config.gpt_model_file)
    source = base if config.adapter_file is None else adapter.read_adapter_config(config.adapter_file)
    return base, read_early_exit(source)


def restore_model(
    base: str, adapter_file: str | None, trainer: Any, changes: dict[str, Any]
) -> MegatronGPTEarlyExitModel:
    """The model with its exits, in eval mode.

    Args:
        base: a full `.nemo`.
        adapter_file: the exits alone; None for those of the base, if it has any.
        trainer: of as many processes as the model runs on.
        changes: keys of the `model` configuration.

    Raises:
        CheckpointError: see `EarlyExitAdapterMixin.restore_with_exits`.
        ConfigError: a model that exits cannot be built on, with remedies for scripts without `model` keys.
    """
    overrides = OmegaConf.create(changes)
    with from_checkpoint(base):
        if adapter_file is not None:
            model = MegatronGPTEarlyExitModel.restore_with_exits(base, adapter_file, trainer, overrides)
        else:
            merged = OmegaConf.merge(run_keys.without_layout(archive.read_config(base)), overrides)
            model = MegatronGPTEarlyExitModel.restore_from(base, override_config_path=merged, trainer=trainer)
    return model.eval()
