# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""An output belongs to one process while that lives, and what it leaves when killed is removed by the next.

While `model.nemo` is written there are `.model.nemo.nemo_ee-lock` beside it, which its process holds a lock on, and
what it will become, under names of the same kind. They are the package's own: whoever finds one whose lock nobody
holds, removes it.
"""

import errno
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nemo_ee.errors import OutputError
from nemo_ee.files import lock
from nemo_ee.files.write_errors import output_error, write_errors

PART, OLD, WORK = "part", "old", "work"
"""Of an output: what becomes it, what it was (while a folder is exchanged), and scratch files for making it."""
_LOCK = "lock"
_OURS = re.compile(rf"\.(.+)\.nemo_ee-({_LOCK}|{PART}|{OLD}|{WORK})", re.DOTALL)
_PATIENCE = 60.0
"""Seconds for others to finish removing what a dead process left here."""

_claims: dict[Path, tuple[int, int]] = {}
"""Outputs: the processes and threads that claimed them. A forked process finds those of the one before, too."""


@contextmanager
def claim(path: str | os.PathLike) -> Iterator[Path]:
    """Keeps other processes from writing an output, for as long as the body runs or this process lives.

    Removes first what dead processes left beside it, of this output and of others in its folder. What the same thread
    has claimed already, it may claim again. Of several ranks, the first alone claims.

    Args:
        path: a file or folder, or a common beginning of several; need not exist. Its folder is created.

    Yields:
        Where it really lies: links are followed.

    Raises:
        OutputError: another process writes there, or nothing can be written there.
    """
    target = real_path(path)
    us = os.getpid(), threading.get_ident()
    process, thread = _claims.get(target, (-1, -1))
    if process == us[0]:
        if thread != us[1]:
            raise OutputError(f"{path}: another thread of this process is writing it; write elsewhere")
        yield target
        return
    with _made_folder(path, target.parent):
        with write_errors(path, every=True):
            sweep(target.parent)
            descriptor = _acquire(target, path)
        _claims[target] = us
        try:
            yield target
        finally:
            if os.getpid() == us[0]:
                del _claims[target]
                with suppress(OSError):
                    beside(target, _LOCK).unlink()
                lock.release(descriptor)


def real_path(path: str | os.PathLike) -> Path:
    """An output's absolute path without links, so that two names of one output are one.

    Raises:
        OutputError: it is no path, or its links lead in a circle.
    """
    try:
        target = Path(os.path.realpath(path))
        is_link = target.is_symlink()
    except OSError as error:
        raise output_error(path, error) from error
    except ValueError as error:
        raise OutputError(f"{os.fspath(path)!r}: is no path ({error}); choose another") from error
    if is_link:
        raise output_error(path, OSError(errno.ELOOP, os.strerror(errno.ELOOP)))
    return target


def beside(target: Path, kind: str) -> Path:
    """The package's own file or folder of an output, in the same folder."""
    return target.with_name(f".{target.name}.nemo_ee-{kind}")


def remove(path: Path) -> None:
    """Removes a file or a folder with its content, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _made_folder(path: str | os.PathLike, folder: Path) -> Iterator[None]:
    """Creates a folder with those above it, and removes afterwards what is empty of these."""
    new = []
    while not os.path.lexists(folder):
        new.append(folder)
        folder = folder.parent
    try:
        with write_errors(path, every=True):
            for each in [folder, *reversed(new)]:
                each.mkdir(exist_ok=True)
        yield
    finally:
        with suppress(OSError):
            for each in new:
                each.rmdir()


def _acquire(target: Path, path: str | os.PathLike) -> int:
    """The descriptor of a locked lock file that is in its place."""
    lock_file, deadline = beside(target, _LOCK), time.monotonic() + _PATIENCE
    while True:
        descriptor, new = _open(lock_file)
        try:
            if lock.take(descriptor):
                if lock.is_at(descriptor, lock_file):
                    _remove_leftovers(target)
                    _sign(descriptor)
                    return descriptor
            elif not lock.take(descriptor, shared=True) or time.monotonic() > deadline:
                owner = _signature(descriptor)
                raise OutputError(f"{path}: {owner} is writing it; wait for its end, or write elsewhere")
        except lock.LocksUnsupportedError as error:
            if new:  # then that it exists is the lock, as good as can be
                _remove_leftovers(target)
                _sign(descriptor)
                return descriptor
            owner = _signature(descriptor)
            lock.release(descriptor)
            raise OutputError(
                f"{path}: {owner} is writing it, or was killed (the file system has no locks that "
                f"would tell); if nobody is, delete {lock_file}"
            ) from error
        except BaseException:
            lock.release(descriptor)
            raise
        lock.release(descriptor)  # removed meanwhile, or held by one who is removing what a dead process left
        time.sleep(0.01)


def _open(lock_file: Path) -> tuple[int, bool]:
    """A descriptor, and whether the file is new."""
    while True:
        with suppress(FileExistsError):
            return lock.open_for_lock(lock_file, os.O_RDWR | os.O_CREAT | os.O_EXCL), True
        with suppress(FileNotFoundError):
            try:
                return lock.open_for_lock(lock_file, os.O_RDWR), False
            except PermissionError:  # another user's, who shares the folder
                return lock.open_for_lock(lock_file, os.O_RDONLY), False


def _sign(descriptor: int) -> None:
    with suppress(OSError):  # a full disk: those who wait are not told who it is
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)


def _signature(descriptor: int) -> str:
    text = os.pread(descriptor, 200, 0).decode(errors="replace")
    return text if text.isprintable() and text else "another process"


def sweep(folder: Path) -> None:
    """Removes what dead processes left in a folder, as far as that can be done, and if nobody else is about it.

    By a lock of the folder's own: of two who clear one output, the slower would remove what a third has begun since.
    """
    with suppress(OSError, lock.LocksUnsupportedError):
        descriptor = lock.open_for_lock(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if lock.take(descriptor):
                _clear_all(folder)
        finally:
            lock.release(descriptor)


def _clear_all(folder: Path) -> None:
    outputs = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            name = _OURS.fullmatch(entry.name)
            if name and entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                outputs.add(name[1])
    for output in outputs:
        with suppress(OSError, lock.LocksUnsupportedError):
            _clear(folder / output)


def _clear(target: Path) -> None:
    """Removes what is left of an output if no process claims it; a claim waits for that, and is not refused.

    The lock is shared: who cannot get it alone, but can share it, knows that nobody writes there.
    """
    lock_file = beside(target, _LOCK)
    descriptor = lock.open_for_lock(lock_file, os.O_RDWR)
    try:
        if lock.take(descriptor, shared=True) and lock.is_at(descriptor, lock_file):
            _remove_leftovers(target)
            lock_file.unlink(missing_ok=True)
    finally:
        lock.release(descriptor)


def _remove_leftovers(target: Path) -> None:
    old = beside(target, OLD)
    if os.path.lexists(old) and not os.path.lexists(target):
        old.rename(target)  # killed in the middle of an exchange
    for kind in (OLD, PART, WORK):
        remove(beside(target, kind))
