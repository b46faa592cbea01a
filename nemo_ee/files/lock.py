# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Locks that end with their process, however it ends: the kernel drops them (`flock`), no file says who is alive.

A lock belongs to an open descriptor. Programs that this process starts do not inherit it, and a forked child closes
it at once, so that only the process that took a lock holds it.
"""

import errno
import os
from pathlib import Path

_CANNOT = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL}
"""What file systems say that have no locks, or, as NFS, none for folders (which cannot be opened for writing)."""

_held: set[int] = set()
_follows_forks = False


class LocksUnsupportedError(Exception):
    """The file system has no locks."""


def open_for_lock(path: Path, flags: int) -> int:
    """A descriptor of a file or folder that can be locked; no link is followed.

    Args:
        path: of the file or folder.
        flags: as of `os.open`.

    Raises:
        OSError: it cannot be opened.
    """
    global _follows_forks
    if not _follows_forks:
        os.register_at_fork(after_in_child=_close_in_child)
        _follows_forks = True
    descriptor = os.open(path, flags | os.O_NOFOLLOW, 0o666)
    _held.add(descriptor)
    return descriptor


def take(descriptor: int, shared: bool = False) -> bool:
    """Locks what `open_for_lock` has opened, without waiting.

    Args:
        descriptor: its result.
        shared: hold it beside others that share it, rather than alone.

    Returns:
        False if another process holds it, or this one through another descriptor.

    Raises:
        LocksUnsupportedError: it cannot be known.
    """
    import fcntl  # not on Windows, where scripts still say that it is not supported

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _CANNOT:
            raise LocksUnsupportedError(error.strerror) from error
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether `path` still is what was opened; a lock on what was removed meanwhile keeps nobody away."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def release(descriptor: int) -> None:
    """Unlocks and closes; nothing in a process that was forked since."""
    if descriptor not in _held:
        return
    import fcntl

    _held.discard(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone leaves it to a child between fork and exec
    except OSError:
        pass  # no locks here
    os.close(descriptor)


def _close_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()
