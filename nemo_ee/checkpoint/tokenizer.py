# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Tokenizers inside ``.nemo`` files. Imports no NeMo until a tokenizer of another library is loaded.

NeMo packs single files (a SentencePiece model) and refers to them as ``nemo:NAME``. A Hugging Face tokenizer it stores
as the path or hub name in ``tokenizer.type``, which says nothing on another machine. Here its files lie in the
archive's ``tokenizer/`` and ``tokenizer.type`` is ``nemo:tokenizer``.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_ee.checkpoint import archive, tokenizer_rules
from nemo_ee.data.tokenizer import TokenizerConfig, load
from nemo_ee.errors import CheckpointError, ConfigError
from nemo_ee.files.scratch import scratch_folder

DIRECTORY = "tokenizer"
INSIDE = f"nemo:{DIRECTORY}"

_FILES = tokenizer_rules.FILES
_DESCRIPTION = (
    "library",
    "type",
    *_FILES,
    "delimiter",
    "sentencepiece_legacy",
    "special_tokens",
    "additional_special_tokens",
)
"""What of a checkpoint's `tokenizer` section describes it; never `trust_remote_code`."""
_UNIQUE = re.compile("^[0-9a-f]{32}_")
"""What NeMo puts before the name of a file each time that it packs it."""
_SUFFIXES = {".json", ".model", ".txt", ".jinja", ".tiktoken"}
_OTHER_FILES = {"generation_config.json", "adapter_config.json"}
"""Of models: the latter has transformers load the model that it names, in place of the one in its folder."""
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
        See :func:`nemo_ee.data.tokenizer.load`.

    Raises:
        CheckpointError: see :func:`tokenizer_files`.
    """
    with tokenizer_files(TokenizerConfig(nemo=os.fspath(path))) as description:
        return load(description)


@contextmanager
def tokenizer_files(config: TokenizerConfig) -> Iterator[TokenizerConfig]:
    """Puts a tokenizer that travels inside a ``.nemo`` on disk while the context is open.

    Args:
        config: any description. Without ``nemo`` it is handed on as it is.

    Yields:
        A description whose files exist, with ``nemo`` unset: processes of one machine can all load it.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or hostile (see
            :func:`nemo_ee.checkpoint.archive.read_config`), has no tokenizer, or lacks files that its configuration
            names; or, in the context, its tokenizer cannot be loaded.
    """
    if config.nemo is None:
        yield config
        return
    model = archive.read_config(config.nemo)
    section = model.get("tokenizer")
    if section is None or section.get("library") is None:
        raise CheckpointError(
            f"{config.nemo}: has no tokenizer.library, so no tokenizer; give a NeMo GPT checkpoint, or a tokenizer"
        )
    kind, inside = section.get("type"), is_inside(model)
    with scratch_folder("tokenizer") as scratch:
        home = scratch / "home"
        if inside:
            root = archive.extract(
                config.nemo, scratch / "archive", want=lambda name: not name.startswith("model_weights")
            )
            resolve(model, root, home, config.nemo)
        plain: dict[str, Any] = OmegaConf.to_container(section)
        values = {key: plain[key] for key in _DESCRIPTION if plain.get(key) is not None}
        values["use_fast"] = bool(section.get("use_fast", False))  # NeMo's default
        if config.add_bos is None:
            values["add_bos"] = section.get("add_bos")
        try:
            yield replace(config, nemo=None, **values)
        except ConfigError as error:
            fault = error.faults[0]
            if fault.key not in ("tokenizer.type", "tokenizer.library"):
                raise
            value = kind if fault.key == "tokenizer.type" else fault.value
            rule, remedy = fault.rule.replace(f"{home}/", ""), "copy the checkpoint again"
            if not inside:
                remedy = "save the model with nemo_ee where it can, which puts the tokenizer into the file"
            raise CheckpointError(f"{config.nemo}: {fault.key}={value}: {rule}; {remedy}") from error


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
