# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Exits as a small checkpoint of their own: save them, load them onto their base, merge the two."""

import os
import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_ee.checkpoint import archive, keys, model_config, shared_archive, sizes, targets, tokenizer
from nemo_ee.checkpoint.content_hash import content_hash_of
from nemo_ee.checkpoint.exits.exit_tensors import check_exits
from nemo_ee.checkpoint.torch_dist import TorchDistCheckpoint, join
from nemo_ee.config import parse_early_exit
from nemo_ee.errors import CheckpointError
from nemo_ee.files.output import work_folder
from nemo_ee.files.scratch import scratch_folder
from nemo_ee.modeling.finite import not_finite

_SHAPE = ("num_layers", "hidden_size")


def save_exits(model: Any, path: str | os.PathLike) -> None:
    """Saves a model's exits, and nothing of its backbone. Collective over the world.

    The file is a ``.nemo``: the model's configuration with ``base: {name, content_hash, vocab_size}``, and a
    torch_dist checkpoint of the ``exits.*`` tensors, which loads at any TP and PP.

    Args:
        model: a `MegatronGPTEarlyExitModel` restored from its base.
        path: the file to write, atomically.

    Raises:
        CheckpointError: the model has no exits, or was not restored from a checkpoint.
    """
    from nemo_ee.checkpoint.load import save_weights

    if not model.early_exit.layers:
        raise CheckpointError(
            f"{path}: model.early_exit is null: there are no exits to save; set model.early_exit"
        )
    base = _base_of(model)
    entry = {"name": base.name, "content_hash": base.content_hash, "vocab_size": model.true_vocab_size}

    def write_config(directory: Path) -> None:
        config = OmegaConf.create(OmegaConf.to_container(model.cfg, resolve=True))
        config.base = entry
        config.early_exit = model.early_exit.to_dict()
        OmegaConf.save(config, directory / archive.CONFIG_NAME)

    shared_archive.save_archive(
        path, lambda directory: save_weights(model, directory, keys.is_exit), write_config
    )


def load_exits(model: Any, path: str | os.PathLike) -> None:
    """Loads exits into a model that has the same exits, in place. Collective over the world.

    Args:
        model: a `MegatronGPTEarlyExitModel` restored from the adapter's base; any TP and PP.
        path: an exits-only ``.nemo``.

    Raises:
        CheckpointError: no adapter, an adapter for another base (both hashes are named), or for another
            vocabulary, width, depth, set of exit layers or head. The model is unchanged then.
    """
    from nemo_ee.checkpoint.load import load_weights

    config = read_adapter_config(path)
    check_fit(path, config, model.cfg, model.true_vocab_size)
    section = OmegaConf.to_container(config.early_exit, resolve=True)
    theirs, ours = parse_early_exit(section, config.num_layers).to_dict(), model.early_exit.to_dict()
    for key in ("layers", "head"):
        if theirs[key] != ours[key]:
            raise CheckpointError(
                f"{path}: early_exit.{key}={theirs[key]}: the model has {ours[key]}; "
                "restore the model with the adapter's early_exit (restore_with_exits does)"
            )
    base = _base_of(model)
    check_hash(path, config, base.name, base.content_hash)
    with scratch_folder("exits") as scratch:
        root = archive.extract(path, scratch)
        load_weights(model, root / archive.WEIGHTS_DIRECTORY, want=keys.is_exit, name=path)


def merge(
    base: str | os.PathLike, adapter: str | os.PathLike, output: str | os.PathLike, overwrite: bool = False
) -> Path:
    """Writes one full ``.nemo`` with the base's backbone and tokenizer, and the adapter's exits in place of its own.

    Files are copied: the backbone's bytes, and so its content hash, stay the same, and no model is built. One
    process; needs disk for twice the base beside ``output``.

    Raises:
        CheckpointError: as :func:`load_exits`; the base's tokenizer cannot be loaded; the exits are not those that
            their configuration and the base ask for, or weights of either hold NaN; the base has its weights in one
            file; or ``output`` exists and may not be overwritten.
    """
    output = Path(output)
    if output.exists() and not overwrite:
        raise CheckpointError(f"{output}: exists; choose another output_path or set overwrite=true")
    config = read_adapter_config(adapter)
    base_config = archive.read_config(base)
    model_config.require(base_config, str(base))
    check_fit(adapter, config, base_config)
    if tokenizer.is_inside(base_config):
        tokenizer.tokenizer_from_nemo(base)  # nobody could use the model without it

    def require_finite(key: str, tensor: Any) -> None:
        if not_finite([(key, tensor)]):
            raise CheckpointError(f"{base}: {key} holds NaN or infinities; get another copy")

    with work_folder(output) as scratch:
        whole = archive.extract(base, Path(scratch, "base"))
        if not (whole / archive.WEIGHTS_DIRECTORY).is_dir():
            raise CheckpointError(
                f"{base}: holds no {archive.WEIGHTS_DIRECTORY}/ but the single file of old NeMo releases; "
                "restore it with MegatronGPTEarlyExitModel, save it with save_to, and merge into that"
            )
        exits = archive.extract(adapter, Path(scratch, "exits"))
        parts = [
            TorchDistCheckpoint(root / archive.WEIGHTS_DIRECTORY, name)
            for root, name in ((whole, base), (exits, adapter))
        ]
        sizes.check_tensors(base_config, parts[0].tensors, base)
        early_exit = check_exits(adapter, config, parts[1], parts[0])
        check_hash(adapter, config, Path(base).name, content_hash_of(parts[0], require_finite))
        merged = Path(scratch, "merged")
        shutil.copytree(whole, merged, ignore=shutil.ignore_patterns(archive.WEIGHTS_DIRECTORY))
        join(parts, merged / archive.WEIGHTS_DIRECTORY, leave=keys.is_exit)
        with open_dict(base_config):
            base_config.early_exit = early_exit.to_dict()
            base_config.target = targets.WITH_EXITS
        OmegaConf.save(base_config, merged / archive.CONFIG_NAME)
        return archive.write_archive(merged, output)


def read_adapter_config(path: str | os.PathLike) -> DictConfig:
    """The configuration of an exits-only ``.nemo``.

    Raises:
        CheckpointError: the file is bad, a full checkpoint, or lacks what every model needs.
    """
    config = archive.read_config(path)
    if "base" not in config or config.get("early_exit") is None:
        raise CheckpointError(
            f"{path}: is a full checkpoint, not exits alone; give a file that scripts/megatron_gpt_ee_tuning.py wrote, "
            "or, if the checkpoint has exits, no adapter_file"
        )
    model_config.require(config, str(path))
    return config


def check_fit(
    path: str | os.PathLike, adapter: DictConfig, model: DictConfig, vocab_size: int | None = None
) -> None:
    """Raises CheckpointError, listing every difference, if exits were made for a model of another shape."""
    faults = [
        f"{path}: {key}={adapter[key]}: the base has {model[key]}; use exits tuned on this base"
        for key in _SHAPE
        if adapter[key] != model[key]
    ]
    if vocab_size is not None and adapter.base.vocab_size != vocab_size:
        faults.append(
            f"{path}: vocabulary of {adapter.base.vocab_size} tokens: the base has {vocab_size}; "
            "use exits tuned on this base"
        )
    if faults:
        raise CheckpointError("\n".join(faults))


def check_hash(path: str | os.PathLike, adapter: DictConfig, name: str, content_hash: str) -> None:
    """Raises CheckpointError, naming both, if exits belong to another base."""
    if adapter.base.content_hash != content_hash:
        raise CheckpointError(
            f"{path}: made for the base {adapter.base.name} with content hash {adapter.base.content_hash}: "
            f"{name} has {content_hash}; use that base"
        )


def _base_of(model: Any):
    if model.base_checkpoint is None:
        raise CheckpointError(
            "the model was not restored from a checkpoint, so its exits have no base; save it whole (save_to)"
        )
    return model.base_checkpoint
