# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Why something cannot be written, in the user's words, and what to do: the disk is full, it is read-only, …"""

import errno
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import nemo_ee.errors
from nemo_ee.errors import OutputError

WRITING_ALONE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What only writing can lead to, so that it needs no file name to know that an output is meant."""

_SAID = {
    errno.ENOSPC: ("the disk is full", "make room, or write to another disk"),
    errno.EDQUOT: ("your disk quota is used up", "delete files of yours, or write to another disk"),
    errno.EFBIG: (
        "it would be larger than a file may be here",
        "raise the limit (ulimit -f unlimited), or write to another disk",
    ),
    errno.EROFS: ("its file system is read-only", "write elsewhere"),
    errno.EACCES: ("you have no permission to write there", "write elsewhere, or change who may"),
    errno.EPERM: ("the system does not allow it", "write elsewhere, or change who may"),
    errno.ENAMETOOLONG: ("its name is too long", "choose a shorter one"),
    errno.EISDIR: ("it is a folder", "name a file in it"),
    errno.ELOOP: ("its links lead in a circle", "choose another path"),
    errno.EIO: ("the disk failed", "look into the system's log (dmesg), and write to another disk"),
    errno.ENOENT: ("its folder is gone", "create it, or write elsewhere"),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n 4096)"),
    errno.ENFILE: ("too many files are open on this machine", "end other programs"),
}
_PYTORCH_WRITER = re.compile(
    r"PytorchStreamWriter failed|enforce fail at inline_container\.cc|^basic_ios::clear"
)
"""How PyTorch says that a write failed, and C++ for it where the last bytes do; neither says why."""
_OURS = tuple(
    kind for kind in vars(nemo_ee.errors).values() if isinstance(kind, type) and issubclass(kind, Exception)
)


def output_error(path: str | os.PathLike, error: OSError, remedy: str | None = None) -> OutputError:
    """What a user is told.

    Args:
        path: what was to be written.
        error: why it could not be.
        remedy: what to do, where that is not the usual.
    """
    path = Path(path)
    what, usual = _SAID.get(error.errno or 0, (error.strerror or str(error), "write elsewhere"))
    if error.errno in (errno.ENOTDIR, errno.EEXIST) and (file := _file_among(path.parents)) is not None:
        what, usual = f"{file} is a file and no folder", "choose another path"
    return OutputError(f"{path}: cannot be written: {what}; {remedy or usual}")


def disk_error(error: BaseException | None) -> OSError | None:
    """The full disk, used up quota, … behind an exception, whichever library raised it; None for all else.

    So it is for errors of this package, which say already what is to be done.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen and not isinstance(error, _OURS):
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in WRITING_ALONE:
            return error
        if not isinstance(error, OSError):
            for number in WRITING_ALONE:
                if os.strerror(number) in str(error):
                    return OSError(number, os.strerror(number))
            if _PYTORCH_WRITER.search(str(error)):
                return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


@contextmanager
def write_errors(path: str | os.PathLike, ours: Collection[Path] = (), every: bool = False) -> Iterator[None]:
    """Turns what keeps the body from writing into an OutputError that names `path`.

    A full disk counts wherever it comes from; another OSError only where it names a file that is `path`, or is or lies
    in one of `ours`: the body may also read. Errors of this package pass as they are.

    Args:
        path: what is written.
        ours: temporary files and folders that become it.
        every: any OSError counts; the body does not read.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        yield
    except Exception as error:
        cause = disk_error(error)
        if cause is None and isinstance(error, OSError) and (every or _names(error, [Path(path), *ours])):
            cause = error
        if cause is None:
            raise
        raise output_error(path, cause) from error


def _names(error: OSError, ours: Collection[Path]) -> bool:
    names = (error.filename, error.filename2)
    named = [Path(os.fsdecode(name)) for name in names if isinstance(name, str | bytes | os.PathLike)]
    return any(name == path or path in name.parents for name in named for path in ours)


def _file_among(paths: Collection[Path]) -> Path | None:
    return next((path for path in paths if os.path.exists(path) and not os.path.isdir(path)), None)
