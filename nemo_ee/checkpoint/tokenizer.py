# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Tokenizers inside ``.nemo`` files. Imports no NeMo until a tokenizer of another library is loaded.

NeMo packs single files (a SentencePiece model) and refers to them as ``nemo:NAME``. A Hugging Face tokenizer it stores
as the path or hub name in ``tokenizer.type``, which says nothing on another machine. Here its files lie in the
archive's ``tokenizer/`` and ``tokenizer.type`` is ``nemo:tokenizer``.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_ee.checkpoint import archive, tokenizer_rules
from nemo_ee.errors import CheckpointError, first_line
from nemo_ee.files.scratch import scratch_folder

DIRECTORY = "tokenizer"
INSIDE = f"nemo:{DIRECTORY}"

_FILES = tokenizer_rules.FILES
_UNIQUE = re.compile("^[0-9a-f]{32}_")
"""What NeMo puts before the name of a file each time that it packs it."""
_SUFFIXES = {".json", ".model", ".txt", ".jinja", ".tiktoken"}
_OTHER_FILES = {"generation_config.json"}
_MAX_BYTES = 256 * 2**20
_LIMITS = {
    "tokenizer.json": 128 * 2**20,
    "tokenizer_config.json": 8 * 2**20,
    "special_tokens_map.json": 8 * 2**20,
    "chat_template.jinja": 2**20,
    "chat_template.json": 2**20,
}
"""File -> the most bytes it may have: a few times what the largest published tokenizers have."""


def tokenizer_from_nemo(path: str | os.PathLike) -> Any:
    """Loads the tokenizer of a ``.nemo`` file; the archive is not needed afterwards.

    Args:
        path: a ``.nemo`` file or the directory of an extracted one.

    Returns:
        A transformers tokenizer; for other libraries NeMo's, as its models have it.

    Raises:
        CheckpointError: the checkpoint is bad (see :func:`nemo_ee.checkpoint.archive.read_config`), has no tokenizer,
            or one that is neither inside nor on this machine.
    """
    config = archive.read_config(path)
    settings = config.get("tokenizer")
    if settings is None or settings.get("library") is None:
        raise CheckpointError(
            f"{path}: has no tokenizer.library, so no tokenizer; give a NeMo GPT checkpoint"
        )
    with scratch_folder("tokenizer") as scratch:
        if is_inside(config):
            root = archive.extract(
                path, Path(scratch, "archive"), want=lambda name: "model_weights" not in name
            )
            resolve(config, root, Path(scratch, "home"), path)
        if settings.library != "huggingface":
            return _load_with_nemo(path, settings)
        if not Path(settings.type).is_dir():
            raise CheckpointError(
                f"{path}: tokenizer.type={settings.type}: is not on this machine; "
                f"save the model with nemo_ee, which puts the tokenizer into the file"
            )
        return _load(Path(settings.type), settings, path)


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
    """Copies what belongs to a tokenizer, and neither weights nor code, from a Hugging Face directory.

    Raises:
        CheckpointError: a file is larger than those of tokenizers.
    """
    source, target = Path(source), Path(target)
    check_files(source)
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        belongs = file.suffix in _SUFFIXES and not file.name.endswith(".index.json")
        if belongs and file.is_file() and file.name not in _OTHER_FILES and file.stat().st_size <= _MAX_BYTES:
            shutil.copyfile(file, target / file.name)
    return target


def check_files(folder: str | os.PathLike) -> None:
    """Raises CheckpointError if a tokenizer's files in a folder are too large to be any."""
    for name, most in _LIMITS.items():
        file = Path(folder, name)
        if file.is_file() and (size := file.stat().st_size) > most:
            raise CheckpointError(
                f"{file}: has {size} bytes, and a tokenizer's has at most {most}; download it again, or use another"
            )


def is_inside(config: DictConfig) -> bool:
    """Whether a ``model`` configuration says that files of its tokenizer lie in the archive."""
    settings = config.get("tokenizer") or {}
    return any(str(settings.get(key)).startswith("nemo:") for key in ("type", *_FILES))


def resolve(
    config: DictConfig,
    root: str | os.PathLike | None,
    home: str | os.PathLike,
    name: str | os.PathLike | None = None,
) -> None:
    """Points the tokenizer of a configuration at files that outlive the extracted archive.

    Args:
        config: the ``model`` configuration, of which :func:`is_inside` is true; changed in place.
        root: the extracted archive; None where nothing is being restored.
        home: a folder that lives as long as the model does.
        name: what errors call the checkpoint; None: `root`.

    Raises:
        CheckpointError: a file is not there.
    """
    settings, root, home = config.tokenizer, Path(root or "."), Path(home)
    name = name or root
    with open_dict(config):
        if settings.get("type") == INSIDE:
            if not (root / DIRECTORY).is_dir():
                raise CheckpointError(
                    f"{name}: tokenizer.type={INSIDE} but there is no {DIRECTORY}/ in the checkpoint; "
                    "set model.tokenizer.type to a tokenizer directory"
                )
            settings.type = str(copy_files(root / DIRECTORY, home / DIRECTORY))
        for key in _FILES:
            if not str(settings.get(key)).startswith("nemo:"):
                continue
            file = settings[key].removeprefix("nemo:")
            if Path(file).name != file or not (root / file).is_file():
                raise CheckpointError(
                    f"{name}: tokenizer.{key}={settings[key]} but there is no {file} in the checkpoint; "
                    f"set model.tokenizer.{key} to such a file"
                )
            home.mkdir(parents=True, exist_ok=True)
            settings[key] = shutil.copyfile(root / file, str(home / (_UNIQUE.sub("", file) or file)))


def _load_with_nemo(path: str | os.PathLike, settings: DictConfig) -> Any:
    from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer

    from nemo_ee.data.token_rules import name_special_pieces

    try:
        tokenizer = get_nmt_tokenizer(
            library=settings.library,
            model_name=settings.get("type"),
            tokenizer_model=settings.get("model"),
            vocab_file=settings.get("vocab_file"),
            merges_file=settings.get("merge_file"),
            delimiter=settings.get("delimiter"),
            special_tokens=settings.get("special_tokens"),
            trust_remote_code=False,
            legacy=settings.get("sentencepiece_legacy", settings.library == "sentencepiece"),
            chat_template=settings.get("chat_template"),
        )
        if settings.get("additional_special_tokens"):
            tokenizer.add_special_tokens(list(settings.additional_special_tokens))
        name_special_pieces(tokenizer)
    except Exception as error:  # every library fails in its own way
        raise CheckpointError(
            f"{path}: tokenizer.library={settings.library}: NeMo cannot load it ({error}); copy the checkpoint again"
        ) from error
    return tokenizer


def _load(directory: Path, settings: DictConfig, path: str | os.PathLike) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory),
            use_fast=settings.get("use_fast", True),
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # whatever a damaged file leads to
        raise CheckpointError(
            f"{path}: holds no tokenizer that transformers can load "
            f"({type(error).__name__}: {first_line(error)[:200]}); convert the checkpoint again"
        ) from error
    if settings.get("chat_template"):
        tokenizer.chat_template = settings.chat_template
    return tokenizer
