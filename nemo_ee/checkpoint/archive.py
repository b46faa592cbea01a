# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Safe handling of ``.nemo`` files: a tar archive, plain or gzipped, or the same content in a directory.

The one way into a checkpoint from elsewhere. An archive is judged as a whole before the first byte of it reaches the
disk, its configuration before anything is built from it; and it is replaced as a whole: a reader sees the old file or
the new one, never a mixture.
"""

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from omegaconf import DictConfig, OmegaConf

from nemo_ee.checkpoint import model_config
from nemo_ee.errors import CheckpointError
from nemo_ee.files import plain_yaml
from nemo_ee.files.output import replaced_file
from nemo_ee.files.tar_headers import TarArchive

CONFIG_NAME = "model_config.yaml"
WEIGHTS_DIRECTORY = "model_weights"
LEGACY_WEIGHTS_NAME = "model_weights.ckpt"

_DO_NOT_LOAD = "do not load it; get the file from a source you trust"


def read_config(path: str | os.PathLike, name: str | os.PathLike | None = None) -> DictConfig:
    """Reads the model configuration and nothing else; see :mod:`nemo_ee.checkpoint.model_config` for what it may say.

    Args:
        path: a ``.nemo`` file, or a directory with its content.
        name: what errors call it, for a directory that was extracted from a file; None: the path.

    Returns:
        The configuration under ``model``, as NeMo's ``restore_from(return_config=True)`` returns it. It holds no
        interpolation.

    Raises:
        CheckpointError: the file is missing, damaged, hostile, or no NeMo checkpoint.
    """
    document = read_document(path, name)
    return document.model if "model" in document else document


def read_document(path: str | os.PathLike, name: str | os.PathLike | None = None) -> DictConfig:
    """As :func:`read_config`, with what the file may have beside ``model``."""
    path = Path(path)
    name = name or path
    if path.is_dir():
        _check_directory(path)
        text = (path / CONFIG_NAME).read_bytes()
    else:
        with _open_validated(path) as archive:
            text = archive.read(archive.members[CONFIG_NAME])
    try:
        document = plain_yaml.load(text)
    except plain_yaml.YamlError as error:
        raise _fault(name, f"{CONFIG_NAME} {error}", model_config.REMEDY) from error
    return OmegaConf.create(model_config.checked(document, f"{name}: {CONFIG_NAME}"))


def extract(
    path: str | os.PathLike,
    directory: str | os.PathLike,
    want: Callable[[str], bool] | None = None,
) -> Path:
    """Extracts a validated ``.nemo`` file.

    Args:
        path: a ``.nemo`` file. A directory is returned as it is: nothing is copied.
        directory: where the members go; created if missing.
        want: keeps only the members whose normalised name (no leading ``./``) it accepts; all by default.

    Returns:
        The directory that holds the content.

    Raises:
        CheckpointError: see :func:`read_config`; or the disk has less free space than the members need.
            Nothing has been written then.
    """
    path, directory = Path(path), Path(directory)
    if path.is_dir():
        _check_directory(path)
        return path
    with _open_validated(path) as archive:
        chosen = {name: member for name, member in archive.members.items() if want is None or want(name)}
        directory.mkdir(parents=True, exist_ok=True)
        needed, free = sum(member.size for member in chosen.values()), shutil.disk_usage(directory).free
        if needed > free:
            raise _fault(
                path,
                f"needs {needed} bytes in {directory} but {free} are free",
                "make room there, or use another disk: by TMPDIR, or beside the output by its path",
            )
        for name, member in chosen.items():
            target = directory / name
            if member.is_folder:
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as sink:
                archive.copy(member, sink)
    return directory


def write_archive(directory: str | os.PathLike, path: str | os.PathLike) -> Path:
    """Packs a directory into a ``.nemo`` file that replaces ``path`` in one step.

    The archive is written under a temporary name in the folder of ``path`` and flushed to disk before it
    takes its place, so an interruption at any moment leaves the old file as it was.

    Args:
        directory: must hold ``model_config.yaml`` at its top; symbolic links are refused.
        path: the ``.nemo`` file to write.

    Returns:
        ``path``.

    Raises:
        OutputError: it cannot be written.
    """
    directory, path = Path(directory), Path(path)
    _check_directory(directory)
    for entry in directory.rglob("*"):
        assert not entry.is_symlink(), f"{entry}: an archive holds no links"
    with replaced_file(path) as part, tarfile.open(part, "w:") as tar:
        tar.add(directory, arcname=".")
    return path


def _open_validated(path: Path) -> TarArchive:
    """An open archive that holds a configuration, and no file in another."""
    archive = TarArchive(path)
    try:
        for name in archive.members:
            for folder in map(str, PurePosixPath(name).parents):
                if folder in archive.members and not archive.members[folder].is_folder:
                    raise _fault(path, f"holds {name!r} within {folder!r}, which is a file", _DO_NOT_LOAD)
        config = archive.members.get(CONFIG_NAME)
        if config is None or config.is_folder:
            raise _fault(
                path, f"holds no {CONFIG_NAME}, so it is no NeMo checkpoint", "give a NeMo checkpoint"
            )
        _check_size(path, config.size)
    except BaseException:
        archive.close()
        raise
    return archive


def _check_directory(directory: Path) -> None:
    if not (directory / CONFIG_NAME).is_file():
        raise _fault(
            directory, f"holds no {CONFIG_NAME}, so it is no extracted .nemo file", "give a NeMo checkpoint"
        )
    _check_size(directory, (directory / CONFIG_NAME).stat().st_size)


def _check_size(path: Path, size: int) -> None:
    if size > plain_yaml.MOST_BYTES:
        raise _fault(
            path, f"{CONFIG_NAME} has {size} bytes, and {plain_yaml.MOST_BYTES} are read", _DO_NOT_LOAD
        )


def _fault(path: str | os.PathLike, what: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}; {remedy}")
