# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Safe handling of ``.nemo`` files: a tar archive, plain or gzipped, or the same content in a directory.

An archive is judged as a whole before the first byte of it reaches the disk, and replaced as a whole: a
reader sees the old file or the new one, never a mixture.
"""

import gzip
import os
import shutil
import stat
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_ee.errors import CheckpointError
from nemo_ee.files.output import replaced_file

CONFIG_NAME = "model_config.yaml"
WEIGHTS_DIRECTORY = "model_weights"
LEGACY_WEIGHTS_NAME = "model_weights.ckpt"

_COPY_AGAIN = "copy or download it again"
_DO_NOT_LOAD = "do not load it; get the file from a source you trust"
_MAX_CONFIG_BYTES = 16 * 2**20
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, OSError)


def read_config(path: str | os.PathLike) -> DictConfig:
    """Reads the model configuration and nothing else.

    Args:
        path: a ``.nemo`` file, or a directory with its content.

    Returns:
        The configuration under ``model``, as NeMo's ``restore_from(return_config=True)`` returns it.

    Raises:
        CheckpointError: the file is missing, damaged, hostile, or no NeMo checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        _check_directory(path)
        text = (path / CONFIG_NAME).read_bytes()
    else:
        with _open_validated(path) as (tar, members):
            text = tar.extractfile(members[CONFIG_NAME]).read()
    try:
        config = OmegaConf.create(text.decode("utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise _fault(
            path, f"{CONFIG_NAME} is no readable YAML ({type(error).__name__})", _COPY_AGAIN
        ) from error
    if not isinstance(config, DictConfig):
        raise _fault(path, f"{CONFIG_NAME} is no mapping", "give a NeMo checkpoint")
    return config.model if "model" in config else config


def validate(path: str | os.PathLike) -> None:
    """Checks that ``path`` is a whole NeMo checkpoint that is safe to extract; writes nothing.

    Raises:
        CheckpointError: see :func:`read_config`.
    """
    path = Path(path)
    if path.is_dir():
        _check_directory(path)
        return
    with _open_validated(path):
        pass


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
    with _open_validated(path) as (tar, members):
        chosen = {name: member for name, member in members.items() if want is None or want(name)}
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
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, open(target, "wb") as sink:
                shutil.copyfileobj(source, sink, 16 * 2**20)
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


class _open_validated:
    """Context of (open tar, members by normalised name), entered only when the whole archive is sound."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> tuple[tarfile.TarFile, dict[str, tarfile.TarInfo]]:
        path = self._path
        if not path.exists():
            raise _fault(path, "no such file", "check the path")
        if not stat.S_ISREG(path.stat().st_mode):
            raise _fault(path, "is neither a file nor a directory", "give a .nemo file")
        with open(path, "rb") as file:
            gzipped = file.read(2) == b"\x1f\x8b"
        try:
            self._tar = tarfile.open(path, "r:gz" if gzipped else "r:")
        except _DAMAGED as error:
            raise _fault(path, f"is no tar archive, so no .nemo file ({error})", _COPY_AGAIN) from error
        try:
            return self._tar, self._checked_members()
        except BaseException:
            self._tar.close()
            raise

    def __exit__(self, *exception) -> None:
        self._tar.close()

    def _checked_members(self) -> dict[str, tarfile.TarInfo]:
        path, tar = self._path, self._tar
        try:
            entries = tar.getmembers()
            # tarfile takes an unreadable header for the end of the archive; a real end is a block of zeros.
            tar.fileobj.seek(tar.offset)
            end = tar.fileobj.read(tarfile.BLOCKSIZE)
            while tar.fileobj.read(1 << 20):  # gzip compares its checksum when it comes to its own end
                pass
        except _DAMAGED as error:
            raise _fault(path, f"is truncated or damaged ({error})", _COPY_AGAIN) from error
        if end != bytes(tarfile.BLOCKSIZE):
            raise _fault(path, f"is truncated or damaged after {len(entries)} members", _COPY_AGAIN)
        members: dict[str, tarfile.TarInfo] = {}
        for entry in entries:
            name = _safe_name(path, entry)
            if name in members:
                raise _fault(path, f"holds {name!r} twice", _DO_NOT_LOAD)
            members[name] = entry
        for name in members:
            for folder in map(str, PurePosixPath(name).parents):
                if folder in members and not members[folder].isdir():
                    raise _fault(path, f"holds {name!r} within {folder!r}, which is a file", _DO_NOT_LOAD)
        config = members.get(CONFIG_NAME)
        if config is None or not config.isreg():
            raise _fault(
                path, f"holds no {CONFIG_NAME}, so it is no NeMo checkpoint", "give a NeMo checkpoint"
            )
        if config.size > _MAX_CONFIG_BYTES:
            raise _fault(path, f"{CONFIG_NAME} has {config.size} bytes", _DO_NOT_LOAD)
        return members


def _safe_name(path: Path, entry: tarfile.TarInfo) -> str:
    """The member's name without ``./``, if it is a plain file or folder below the archive's top."""
    name = PurePosixPath(entry.name)
    if not (entry.isreg() or entry.isdir()):
        kind = "a link" if entry.issym() or entry.islnk() else "a device or other special file"
        raise _fault(path, f"member {entry.name!r} is {kind}", _DO_NOT_LOAD)
    if name.is_absolute() or ".." in name.parts or "\\" in entry.name or "\0" in entry.name:
        raise _fault(path, f"member {entry.name!r} points outside the archive", _DO_NOT_LOAD)
    return str(name)


def _check_directory(directory: Path) -> None:
    if not (directory / CONFIG_NAME).is_file():
        raise _fault(
            directory, f"holds no {CONFIG_NAME}, so it is no extracted .nemo file", "give a NeMo checkpoint"
        )


def _fault(path: Path, what: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}; {remedy}")
