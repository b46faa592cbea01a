# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Hugging Face tokenizers inside ``.nemo`` files. Imports no NeMo.

NeMo stores such a tokenizer as the path or hub name in ``tokenizer.type``, which says nothing on another
machine. Here its files lie in the archive's ``tokenizer/`` and ``tokenizer.type`` is ``nemo:tokenizer``.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_ee.checkpoint import archive
from nemo_ee.errors import CheckpointError

DIRECTORY = "tokenizer"
INSIDE = f"nemo:{DIRECTORY}"

_SUFFIXES = {".json", ".model", ".txt", ".jinja", ".tiktoken"}
_OTHER_FILES = {"generation_config.json"}
_MAX_BYTES = 256 * 2**20


def tokenizer_from_nemo(path: str | os.PathLike) -> Any:
    """Loads the transformers tokenizer of a ``.nemo`` file; the archive is not needed afterwards.

    Args:
        path: a ``.nemo`` file or the directory of an extracted one.

    Returns:
        A transformers tokenizer.

    Raises:
        CheckpointError: the checkpoint is bad (see :func:`nemo_ee.checkpoint.archive.read_config`), names a
            tokenizer of another library, or one that is neither inside nor on this machine.
    """
    settings = archive.read_config(path).get("tokenizer")
    if settings is None or settings.get("library") != "huggingface":
        library = None if settings is None else settings.get("library")
        raise CheckpointError(
            f"{path}: tokenizer.library={library}: must be huggingface; convert the checkpoint again"
        )
    if settings.type != INSIDE:
        if not Path(settings.type).is_dir():
            raise CheckpointError(
                f"{path}: tokenizer.type={settings.type}: is not on this machine; "
                f"save the model with nemo_ee, which puts the tokenizer into the file"
            )
        return _load(Path(settings.type), settings)
    with tempfile.TemporaryDirectory() as scratch:
        wanted = (DIRECTORY, archive.CONFIG_NAME)
        root = archive.extract(path, scratch, want=lambda name: name.split("/")[0] in wanted)
        return _load(root / DIRECTORY, settings)


def pack(settings: DictConfig | None, live: Any, config_file: str | os.PathLike) -> bool:
    """Puts a model's Hugging Face tokenizer beside the configuration in the folder that becomes its ``.nemo`` file.

    Args:
        settings: the model's ``tokenizer`` section. Where ``type`` is a directory its files are copied
            unchanged.
        live: the transformers tokenizer in use, which writes the files where ``type`` is a hub name.
        config_file: the model's configuration, written already; ``tokenizer.type`` is changed in it.

    Returns:
        False, and nothing written, for tokenizers of other libraries: NeMo packs their single files itself.
    """
    if settings is None or settings.get("library") != "huggingface":
        return False
    target = Path(config_file).parent / DIRECTORY
    if Path(str(settings.type)).is_dir():
        copy_files(settings.type, target)
    else:
        live.save_pretrained(target)
    config = OmegaConf.load(config_file)
    config.tokenizer.type = INSIDE
    OmegaConf.save(config, config_file)
    return True


def copy_files(source: str | os.PathLike, target: str | os.PathLike) -> Path:
    """Copies what belongs to a tokenizer, and no weights, from a Hugging Face directory."""
    source, target = Path(source), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        belongs = file.suffix in _SUFFIXES and not file.name.endswith(".index.json")
        if belongs and file.is_file() and file.name not in _OTHER_FILES and file.stat().st_size <= _MAX_BYTES:
            shutil.copyfile(file, target / file.name)
    return target


def is_inside(config: DictConfig) -> bool:
    """Whether a ``model`` configuration says that the tokenizer lies in the archive's folder."""
    return (config.get("tokenizer") or {}).get("type") == INSIDE


def resolve(config: DictConfig, root: str | os.PathLike | None, home: str | os.PathLike) -> None:
    """Points ``tokenizer.type`` of a configuration at files that outlive the extracted archive.

    Args:
        config: the ``model`` configuration, of which :func:`is_inside` is true; changed in place.
        root: the extracted archive; None where nothing is being restored.
        home: a folder that lives as long as the model does.

    Raises:
        CheckpointError: the tokenizer is not there.
    """
    if root is None or not (Path(root) / DIRECTORY).is_dir():
        raise CheckpointError(
            f"{root}: tokenizer.type={INSIDE} but there is no {DIRECTORY}/ in the checkpoint; "
            "set model.tokenizer.type to a tokenizer directory"
        )
    with open_dict(config):
        config.tokenizer.type = str(copy_files(Path(root) / DIRECTORY, Path(home) / DIRECTORY))


def _load(directory: Path, settings: DictConfig) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), use_fast=settings.get("use_fast", True), local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory}: holds no tokenizer that transformers can load ({error}); "
            "convert the checkpoint again"
        ) from error
    if settings.get("chat_template"):
        tokenizer.chat_template = settings.chat_template
    return tokenizer
