# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Folders for temporary files, in TMPDIR. Whoever makes one removes first those whose process has been killed."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.util import Finalize
from pathlib import Path

from nemo_ee.errors import OutputError
from nemo_ee.files import lock
from nemo_ee.files.write_errors import disk_error, output_error, write_errors

_SUFFIX = ".scratch"
_OURS = re.compile(rf"nemo_ee_[a-z_]+_[a-z0-9_]{{8}}{re.escape(_SUFFIX)}")
_ELSEWHERE = "set TMPDIR to a folder on a disk with more room"


class ScratchFolder:
    """A folder that lives until `close`, or as long as this object, or as its process.

    It is named ``nemo_ee_<purpose>_….scratch``. The process holds a lock on it, which goes with the process however
    that ends; a folder whose lock nobody holds is removed by whoever makes the next.

    Args:
        purpose: small letters and underscores, for whoever looks into TMPDIR.

    Attributes:
        path: the folder, empty at first.

    Raises:
        OutputError: no folder can be made; what to do.
    """

    def __init__(self, purpose: str):
        assert re.fullmatch("[a-z_]+", purpose), purpose
        try:
            parent = Path(tempfile.gettempdir())
        except OSError as error:
            raise OutputError(f"TMPDIR: no folder for temporary files ({error}); {_ELSEWHERE}") from error
        _sweep(parent)
        with write_errors(parent, every=True):
            self.path, descriptor = _make(parent, purpose)
        # multiprocessing's finaliser, as it runs in processes of multiprocessing, too, and in no forked copy
        self._remove = Finalize(self, _remove, (str(self.path), descriptor), exitpriority=0)

    def close(self) -> None:
        """Removes the folder."""
        self._remove()


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """A folder for the time of the body.

    Args:
        purpose: as of `ScratchFolder`.

    Raises:
        OutputError: no folder can be made, or its disk is full; what to do.
    """
    folder = ScratchFolder(purpose)
    try:
        yield folder.path
    except Exception as error:
        cause = disk_error(error)
        if cause is None or not _concerns(folder.path, cause):
            raise
        raise output_error(folder.path, cause, None if cause.errno == errno.EFBIG else _ELSEWHERE) from error
    finally:
        folder.close()


def _concerns(folder: Path, error: OSError) -> bool:
    """Whether it was this folder that could not be written. Errors of outputs have become OutputErrors by now."""
    return not isinstance(error.filename, str) or folder in Path(error.filename).parents


def _make(parent: Path, purpose: str) -> tuple[Path, int]:
    """A new folder, locked before anyone could take it for a dead process's."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"nemo_ee_{purpose}_", suffix=_SUFFIX, dir=parent))
        try:
            descriptor = lock.open_for_lock(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        with suppress(lock.LocksUnsupportedError):  # then nobody removes it
            if not (lock.take(descriptor) and lock.is_at(descriptor, path)):
                lock.release(descriptor)
                continue
        return path, descriptor


def _sweep(parent: Path) -> None:
    with suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if _OURS.fullmatch(entry.name) and entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                with suppress(OSError, lock.LocksUnsupportedError):
                    _remove_if_dead(Path(entry))


def _remove_if_dead(path: Path) -> None:
    descriptor = lock.open_for_lock(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if lock.take(descriptor):
            shutil.rmtree(path, ignore_errors=True)
    finally:
        lock.release(descriptor)


def _remove(path: str, descriptor: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    lock.release(descriptor)
