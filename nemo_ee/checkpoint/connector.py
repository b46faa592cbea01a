# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""NeMo's save and restore connector with atomic writes, validated reads and the tokenizer inside the file."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.collections.nlp.parts.nlp_overrides import NLPSaveRestoreConnector
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf

from nemo_ee.checkpoint import archive, keys, model_config, shared_archive, sizes, targets, tokenizer
from nemo_ee.checkpoint.conversion.base import BaseCheckpoint
from nemo_ee.checkpoint.legacy import read_legacy_weights
from nemo_ee.checkpoint.load import check_values, has_fp8_state, load_weights, save_weights
from nemo_ee.checkpoint.torch_dist import TorchDistCheckpoint
from nemo_ee.errors import CheckpointError
from nemo_ee.files.scratch import scratch_folder
from nemo_ee.models.megatron_gpt_model import MegatronGPTModel


class EarlyExitSaveRestoreConnector(NLPSaveRestoreConnector):
    """Drop-in for :class:`NLPSaveRestoreConnector`, for our models and for NeMo's plain GPT.

    What differs:

    - Saving writes beside the target and replaces it in one step.
    - A Hugging Face tokenizer's files travel in the archive's ``tokenizer/``.
    - Restoring judges the whole archive before anything is extracted, and its weights before a model is
      built.
    - Checkpoints named by any layer spec load, into truncated models too. A checkpoint without exits loads
      into a model with exits, which keep their initial values.
    - A tensor of the checkpoint that the model has no place for is an error: it would be another model.

    Args:
        exits: restore a checkpoint's exits; otherwise they are left behind, and the model's keep their
            initial values.
    """

    def __init__(self, exits: bool = True):
        super().__init__()
        self.exits = exits
        self._restored_path: str | os.PathLike | None = None

    def save_to(self, model: Any, save_path: str) -> None:
        """Saves a model. Collective over the world.

        Args:
            model: a NeMo GPT model on megatron-core.
            save_path: the ``.nemo`` file, on a file system that all ranks see.
        """
        start_distributed(model.trainer)
        if not self.pack_nemo_file or model.sharded_state_dict() is None:
            raise CheckpointError(
                f"{save_path}: only packed megatron-core models can be saved; "
                "use mcore_gpt=true, no FSDP, and pack_nemo_file=true"
            )

        def write_rest(directory: Path) -> None:
            config_file = directory / self.model_config_yaml
            model.to_config_file(path2yaml_file=str(config_file))
            if getattr(model, "artifacts", None):
                self._handle_artifacts(model, nemo_file_folder=str(directory))
                self._update_artifact_paths(model, path2yaml_file=str(config_file))
            live = getattr(model.tokenizer, "tokenizer", None)
            if tokenizer.pack(model.cfg.get("tokenizer"), live, config_file):
                _name_plain_gpt(config_file)

        shared_archive.save_archive(save_path, lambda directory: save_weights(model, directory), write_rest)

    def restore_from(
        self,
        calling_cls: type,
        restore_path: str,
        override_config_path: DictConfig | str | None = None,
        map_location: torch.device | None = None,
        strict: bool = True,
        return_config: bool = False,
        trainer: Any = None,
        validate_access_integrity: bool = True,
        replace_sharded_tensor_key: str | None = None,
    ) -> Any:
        """As NeMo's. Collective over the world, unless ``return_config``.

        Raises:
            CheckpointError: the archive is missing, damaged, hostile, exits only, or does not fit the
                configuration; see :mod:`nemo_ee.checkpoint.archive` and :mod:`nemo_ee.checkpoint.fit`.
        """
        assert strict and replace_sharded_tensor_key is None, "not supported: weights are fitted by key"
        if return_config and override_config_path is None:
            return archive.read_config(self.model_extracted_dir or restore_path)
        given = self.model_extracted_dir
        with scratch_folder("restore") as scratch:
            root = archive.extract(given or restore_path, scratch)
            saved = archive.read_config(root, restore_path)
            override = _read_override(override_config_path)
            config = saved.copy() if override is None else override
            if return_config:
                return config
            if hasattr(calling_cls, "exits_to_take"):
                # Else NeMo would build the class that wrote the file, if that is none above ours; and where building
                # fails, it would log a traceback and build once more.
                config.pop("target", None)
            model_config.refuse_adapter(restore_path, saved)
            model_config.require(config, str(restore_path))
            weights = root / archive.WEIGHTS_DIRECTORY
            checkpoint = TorchDistCheckpoint(weights, restore_path) if weights.is_dir() else None
            _check_sizes(saved, checkpoint, root, restore_path)
            self.model_extracted_dir, self._restored_path = str(root), restore_path
            try:
                config, model, state = self.load_config_and_state_dict(
                    calling_cls, str(restore_path), config, map_location, strict, False, trainer
                )
            finally:
                self.model_extracted_dir = given
            if state is not None:
                state = self.modify_state_dict(config, state)
                state = _fit_legacy(state, model, restore_path)
                check_values(model, state, restore_path)
                self.load_instance_with_state_dict(model, state, False)
                taken: Collection[int] = ()
            else:
                start_distributed(model.trainer)
                taken = self._restore_weights(model, checkpoint, saved, validate_access_integrity)
            _record_base(model, Path(restore_path), root, taken)
        logging.info(f"{type(model).__name__} was restored from {restore_path}.")
        return model

    def _restore_weights(
        self,
        model: Any,
        checkpoint: TorchDistCheckpoint,
        saved: DictConfig,
        validate_access_integrity: bool,
    ) -> Collection[int]:
        """Loads a built model's weights; returns the exits that had theirs in the checkpoint."""
        here = keys.exit_layers(checkpoint.tensors) if self.exits else ()
        taken = model.exits_to_take(here, saved) if hasattr(model, "exits_to_take") else ()
        leaves = not self.exits or getattr(model, "leaves_exits", False)
        load_weights(
            model,
            checkpoint,
            () if taken else (keys.EXITS_PREFIX,),
            validate_access_integrity=validate_access_integrity,
            state=model.state_to_restore(taken) if hasattr(model, "state_to_restore") else None,
            may_leave=keys.is_exit if leaves else None,
        )
        if hasattr(model, "copies_to_restore"):  # also on a stage that copies nothing: loading is collective
            load_weights(model, checkpoint, state=model.copies_to_restore(), partial=True)
        return taken

    def _load_state_dict_from_disk(self, model_weights: str, map_location: Any = None) -> Any:
        """A single ``model_weights.ckpt`` is read without running code from it; None for torch_dist."""
        if not os.path.isfile(model_weights):
            return super()._load_state_dict_from_disk(model_weights, map_location)
        return read_legacy_weights(Path(model_weights), name=self._restored_path)


def _name_plain_gpt(config_file: Path) -> None:
    """NeMo's own class as ``target`` becomes the name by which NeMo can read the tokenizer beside it."""
    config = OmegaConf.load(config_file)
    if config.get("target") == f"{MegatronGPTModel.__module__}.{MegatronGPTModel.__qualname__}":
        config.target = targets.PLAIN
        OmegaConf.save(config, config_file)


def start_distributed(trainer: Any) -> None:
    """Brings up torch.distributed and the model-parallel groups if they are not there, as NeMo does."""
    if not parallel_state.is_initialized():
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.launch(lambda: None, trainer=trainer)
        trainer.strategy.setup_environment()


def _read_override(override: DictConfig | str | None) -> DictConfig | None:
    if override is None:
        return None
    config = OmegaConf.load(override) if isinstance(override, str | os.PathLike) else override
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    return config.model if "model" in config else config


def _fit_legacy(state: dict[str, Any], model: Any, name: str | os.PathLike) -> dict[str, Any]:
    """The weights of a ``model_weights.ckpt`` under this model's names.

    Raises:
        CheckpointError: the model has other tensors; torch's own check is not enough, since NeMo goes on from
            it where only the checkpoint has more.
    """
    wanted = model.state_dict()
    state = keys.respell(state, wanted)
    if not has_fp8_state(model):
        state = {key: None if keys.is_extra_state(key) else value for key, value in state.items()}
    missing = sorted(key for key in wanted.keys() - state.keys() if not keys.is_extra_state(key))
    left = sorted(key for key in state.keys() - wanted.keys() if not keys.is_extra_state(key))
    if missing and all(keys.is_exit(key) for key in missing):
        raise CheckpointError(
            f"{name}: holds one file of an old NeMo release, to which exits cannot be added; restore it with "
            "MegatronGPTEarlyExitModel without early_exit, save it with save_to, and use that"
        )
    other = [
        f"{key}: model {tuple(wanted[key].shape)}, checkpoint {tuple(getattr(value, 'shape', ()))}"
        for key, value in state.items()
        if isinstance(wanted.get(key), torch.Tensor)
        and not keys.is_extra_state(key)
        and (not isinstance(value, torch.Tensor) or wanted[key].shape != value.shape)
    ]
    for what, found in (("lacks", missing), ("has beyond the model", left), ("has in other shapes", other)):
        if found:
            raise CheckpointError(
                f"{name}: {what} {len(found)} tensors, first {', '.join(found[:5])}; "
                "restore it with the configuration it was saved with"
            )
    return state


def _record_base(model: Any, path: Path, root: Path, taken: Collection[int]) -> None:
    """Notes which checkpoint the backbone came from; hashes it at once where exits are about to be tuned."""
    if not hasattr(model, "base_checkpoint"):
        return
    model.base_checkpoint = BaseCheckpoint(path)
    early_exit = model.cfg.get("early_exit")
    if early_exit is not None and set(early_exit.layers) - set(taken):
        model.base_checkpoint.hash_now(root)


def _check_sizes(
    saved: DictConfig, checkpoint: TorchDistCheckpoint | None, root: Path, name: str | os.PathLike
) -> None:
    """Raises CheckpointError if the weights are not those that the configuration beside them describes."""
    legacy = root / archive.LEGACY_WEIGHTS_NAME
    if checkpoint is not None:
        sizes.check_tensors(saved, checkpoint.tensors, name)
    elif legacy.is_file():
        model_config.require(saved, str(name))
        sizes.check_bytes(saved, legacy.stat().st_size, name)
    else:
        raise CheckpointError(
            f"{name}: holds neither {archive.WEIGHTS_DIRECTORY}/ nor {archive.LEGACY_WEIGHTS_NAME}, so no weights; "
            f"{model_config.REMEDY}"
        )
