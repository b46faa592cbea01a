# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The one way to write a file or folder: beside its place, flushed to the disk, and then into it in one step.

Whatever happens meanwhile, an error, a full disk, SIGKILL or a loss of power, what was there before stays as it was.
What such an end leaves beside it goes at once or, after SIGKILL, when the next process writes into that folder.
"""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from nemo_ee.errors import OutputError
from nemo_ee.files.claim import OLD, PART, WORK, beside, claim, real_path, remove
from nemo_ee.files.write_errors import write_errors

__all__ = [
    "claim",
    "replaced_file",
    "replaced_files",
    "replaced_folder",
    "work_folder",
    "write_text",
    "write_with",
]


@contextmanager
def replaced_file(path: str | os.PathLike) -> Iterator[Path]:
    """Writes a file, which appears or is replaced when the body ends without an error.

    Args:
        path: the file. A link stays one, and the file that it names is replaced.

    Yields:
        A path in the same folder, which the body writes a file to. Its suffix is not that of `path`.

    Raises:
        OutputError: another process writes there, or it cannot be written; what to do.
    """
    with replaced_files([path]) as (part,):
        yield part
        assert part.exists(), f"nothing was written to {part}"


def write_text(path: Path, text: str) -> Path:
    """Writes a text file in one step; returns its path.

    Raises:
        OutputError: it cannot be written.
    """
    return write_with(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_with(path: Path, write: Callable[[Path], object]) -> Path:
    """Writes a file in one step; returns its path.

    Args:
        path: the file.
        write: writes it to the path that it is given.

    Raises:
        OutputError: it cannot be written.
    """
    with replaced_file(path) as part:
        write(part)
    return path


@contextmanager
def replaced_files(paths: Sequence[str | os.PathLike]) -> Iterator[list[Path]]:
    """Writes files that belong together. That the last one exists means that all are there, and of one make.

    When the body ends, and all of its files are on the disk, the old ones are removed, the last one first, and the new
    ones take their places in order.

    Args:
        paths: the files.

    Yields:
        Paths to write them to, as `replaced_file` does. For what the body does not write there will be no file.

    Raises:
        OutputError: as of `replaced_file`.
    """
    for path in paths:
        _check_kind(path, folder=False)
    with ExitStack() as claims:
        real = {os.fspath(path): claims.enter_context(claim(path)) for path in sorted(paths, key=os.fspath)}
        targets = [real[os.fspath(path)] for path in paths]
        parts = [beside(target, PART) for target in targets]
        with _removing(parts), write_errors(paths[0], [*parts, *targets]):
            yield parts
            with write_errors(paths[0], every=True):
                _publish_files(parts, targets)


@contextmanager
def replaced_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Writes a folder, which appears or is replaced as a whole when the body ends without an error.

    Args:
        path: the folder. All that is in it goes when it is replaced.

    Yields:
        An empty folder beside it, for the body to fill.

    Raises:
        OutputError: another process writes there, or it cannot be written; what to do.
    """
    _check_kind(path, folder=True)
    with claim(path) as target:
        part, old = beside(target, PART), beside(target, OLD)
        with _removing([part]), write_errors(path, [part, target]):
            part.mkdir()
            yield part
            with write_errors(path, every=True):
                for folder, _, files in os.walk(part, topdown=False):
                    for name in files:
                        _flush(Path(folder, name))
                    _flush_folder(Path(folder))
                if target.exists():
                    os.rename(target, old)  # a claim brings it back, were we killed before the next line
                os.rename(part, target)
                _flush_folder(target.parent)
            with suppress(OSError):
                remove(old)


@contextmanager
def work_folder(path: str | os.PathLike) -> Iterator[Path]:
    """An empty folder on the disk of an output, for making it; goes when the body ends.

    Args:
        path: the output, which is claimed.

    Raises:
        OutputError: another process writes the output, or nothing can be written there; what to do.
    """
    with claim(path) as target:
        work = beside(target, WORK)
        with _removing([work]), write_errors(path, [work]):
            work.mkdir()
            yield work


def _publish_files(parts: Sequence[Path], targets: Sequence[Path]) -> None:
    written = {part for part in parts if part.exists()}  # asked once: what vanishes later is an error
    for part in written:
        _flush(part)
    for part, target in reversed([*zip(parts, targets, strict=True)]):
        if len(parts) > 1 or part not in written:
            target.unlink(missing_ok=True)
    for part, target in zip(parts, targets, strict=True):
        if part in written:
            os.replace(part, target)
    for folder in {target.parent for target in targets}:
        _flush_folder(folder)


@contextmanager
def _removing(paths: Sequence[Path]) -> Iterator[None]:
    try:
        yield
    finally:
        for path in paths:
            with suppress(OSError):
                remove(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(path: Path) -> None:
    """As far as that can be done: some file systems cannot, and one may write into folders that one may not read."""
    try:
        _flush(path)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EBADF, errno.EINVAL):
            raise


def _check_kind(path: str | os.PathLike, folder: bool) -> None:
    with write_errors(path, every=True):
        target = real_path(path)
        is_file, is_folder, exists = target.is_file(), target.is_dir(), target.exists()
    if is_folder and not folder:
        raise OutputError(f"{path}: cannot be written: it is a folder; name a file in it")
    if is_file and folder:
        raise OutputError(f"{path}: cannot be written: it is a file; name a folder")
    if exists and not (is_file or is_folder):
        raise OutputError(
            f"{path}: cannot be written: it is neither a file nor a folder; choose another path"
        )
