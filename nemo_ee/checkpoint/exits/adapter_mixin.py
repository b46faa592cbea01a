# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The surface of NeMo's ``NLPAdapterModelMixin``, for exits."""

import os
from collections.abc import Collection
from typing import Any

import torch
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_ee.checkpoint import archive, run_keys
from nemo_ee.checkpoint.connector import EarlyExitSaveRestoreConnector
from nemo_ee.checkpoint.conversion.base import BaseCheckpoint
from nemo_ee.checkpoint.exits import adapter
from nemo_ee.checkpoint.keys import is_exit
from nemo_ee.errors import ConfigError, Fault, as_written


class EarlyExitAdapterMixin:
    """Save, load and restore exits apart from their backbone; put it before the NeMo model class.

    Names follow NeMo's PEFT mixin as far as they fit. Exits are part of the module from construction on, so
    there is no ``add_adapter`` for a live model: :meth:`add_exits` extends the configuration it is built
    from.
    """

    base_checkpoint: BaseCheckpoint | None = None
    """Where the backbone came from; None for a model that was not restored."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._save_restore_connector = EarlyExitSaveRestoreConnector()

    @classmethod
    def restore_from(
        cls, restore_path: str, *args: Any, save_restore_connector: Any = None, **kwargs: Any
    ) -> Any:
        """NeMo's ``restore_from``, with :class:`EarlyExitSaveRestoreConnector` where none is given."""
        archive.read_config(restore_path)  # which judges the whole, before NeMo looks at it
        connector = save_restore_connector or EarlyExitSaveRestoreConnector()
        return super().restore_from(restore_path, *args, save_restore_connector=connector, **kwargs)

    @classmethod
    def add_exits(cls, config: DictConfig, early_exit: DictConfig | dict) -> DictConfig:
        """A model configuration with exits, with which to restore a checkpoint that has none.

        Args:
            config: ``model`` configuration, e.g. from ``restore_from(base, return_config=True)``; not
                changed.
            early_exit: the ``early_exit`` section.
        """
        config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
        with open_dict(config):
            config.early_exit = early_exit
        return config

    @classmethod
    def restore_with_exits(
        cls,
        base: str | os.PathLike,
        exits: str | os.PathLike,
        trainer: Any,
        overrides: DictConfig | None = None,
    ) -> Any:
        """Restores a base and loads exits onto it. Collective over the world.

        Args:
            base: the full ``.nemo``; exits that it has itself are left behind.
            exits: the exits-only ``.nemo`` tuned on it.
            trainer: a Lightning trainer with an NLPDDPStrategy.
            overrides: ``model`` keys to set, e.g. the parallel sizes. The layout of the run that wrote the base
                does not count (:data:`nemo_ee.checkpoint.run_keys.LAYOUT`).

        Raises:
            CheckpointError: see :func:`nemo_ee.checkpoint.exits.adapter.load_exits`; a misfit that the
                configurations show is raised before the model is built.
        """
        base_config, adapter_config = archive.read_config(base), adapter.read_adapter_config(exits)
        adapter.check_fit(exits, adapter_config, base_config)
        config = cls.add_exits(run_keys.without_layout(base_config), adapter_config.early_exit)
        with open_dict(config):
            config.early_exit.init = "random"  # every value is loaded
            if overrides is not None:
                config = OmegaConf.merge(config, overrides)
        model = cls.restore_from(
            str(base),
            override_config_path=config,
            trainer=trainer,
            save_restore_connector=EarlyExitSaveRestoreConnector(exits=False),
        )
        model.load_adapters(exits)
        return model

    def load_adapters(self, filepath: str | os.PathLike) -> None:
        """Loads exits; see :func:`nemo_ee.checkpoint.exits.adapter.load_exits`."""
        adapter.load_exits(self, filepath)

    def save_adapters(self, filepath: str | os.PathLike) -> None:
        """Saves exits; see :func:`nemo_ee.checkpoint.exits.adapter.save_exits`."""
        adapter.save_exits(self, filepath)

    def get_peft_state_dict(self) -> dict[str, torch.Tensor]:
        """This rank's parameters and buffers of exits, and nothing else, by key."""
        state = self.get_model_module_list()[0].state_dict(prefix="model.")
        return {key: value for key, value in state.items() if is_exit(key)}

    @classmethod
    def merge_cfg_with(cls, path: str | os.PathLike, cfg: DictConfig) -> DictConfig:
        """A checkpoint's configuration with the keys of ``cfg.model`` over it, as NeMo's PEFT mixin has it.

        What the checkpoint says of the run that wrote it is left out; see :mod:`nemo_ee.checkpoint.run_keys`.

        Args:
            path: a full ``.nemo``.
            cfg: a script's configuration with ``model`` and ``trainer``.

        Returns:
            The ``model`` configuration; ``trainer.precision`` becomes its ``precision``.

        Raises:
            ConfigError: a key that the tensors' shapes follow from is another than the checkpoint's.
        """
        return cls._put_over(path, cfg, None)

    @classmethod
    def _put_over(cls, path: str | os.PathLike, cfg: DictConfig, given: Collection[str] | None) -> DictConfig:
        """As :meth:`merge_cfg_with`; of what describes the model, the keys in ``given`` alone are taken.

        Raises:
            ConfigError: one of them would need other tensors.
        """
        saved = archive.read_config(path)
        config, changed = run_keys.put_over(saved, cfg.model, given)
        if impossible := sorted(changed.keys() & run_keys.SHAPES):
            rule = f"the weights of {path} were saved with"
            faults = [(key, OmegaConf.select(saved, key)) for key in impossible]
            raise ConfigError(
                *(
                    Fault(f"model.{key}", changed[key], f"{rule} {theirs}", "leave it out")
                    for key, theirs in faults
                )
            )
        with open_dict(config):
            precision = OmegaConf.select(cfg, "trainer.precision")
            if precision is not None:
                config.precision = precision
        for key, value in changed.items():
            theirs = OmegaConf.select(saved, key)
            logging.warning(
                f"model.{key}={as_written(value)}: is used as given; {path} was saved with {as_written(theirs)}."
            )
        return config

    @classmethod
    def merge_inference_cfg(cls, path: str | os.PathLike, cfg: DictConfig) -> DictConfig:
        """As :meth:`merge_cfg_with`, for generation: no activation checkpointing, no sequence parallelism."""
        config = cls.merge_cfg_with(path, cfg)
        with open_dict(config):
            for key in ("granularity", "method", "num_layers"):
                config[f"activations_checkpoint_{key}"] = None
            config.sequence_parallel = False
        return config
