# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint's content hash, kept in a small file beside it, so that 140 GB are read once and not at each start.

``base.nemo`` has ``base.nemo.content_hash.json``. It holds the hash and a stamp: sizes and times of what was hashed.
It counts only where the stamp is that of the files as they are now; otherwise, and where it is damaged, it is
ignored and replaced. Where it cannot be written, the hash is computed at each start.

What a wrong one could do: the hash decides whether exits fit a base and nothing else. Nothing is run or unpacked
because of it, and it names no paths. Exits on another base than their own compute nonsense. Who can write beside a
checkpoint can as well exchange the checkpoint itself; remove the file if in doubt, and the hash is computed again.
"""

import hashlib
import json
import os
import re
import stat
import time
from contextlib import suppress
from pathlib import Path

from nemo_ee.errors import OutputError
from nemo_ee.files.output import replaced_file

VERSION = 1
"""Of this file and of what `backbone_content_hash` counts."""
SUFFIX = ".content_hash.json"
SETTLED_NS = 2_000_000_000
"""A file younger than this may change again without a new time: clocks of file systems are that coarse."""
_LONGEST = 4096
_HASH = re.compile(r"[0-9a-f]{64}")


def stamp_of(path: Path) -> str | None:
    """Sizes and times (of content and of inode) of a file, or of all files in a directory; None if it is gone.

    The inode's time cannot be set by a copy that keeps times. To copy or rename a checkpoint so only costs
    computing its hash again.
    """
    try:
        if path.is_file():
            return f"file {_stamp(path)}"
        if not path.is_dir():
            return None
        digest = hashlib.sha256()
        for file in _files(path):
            digest.update(f"{file.relative_to(path)}\0{_stamp(file)}\n".encode(errors="surrogateescape"))
        return f"directory {digest.hexdigest()}"
    except FileNotFoundError:
        return None  # it is being changed


def is_settled(path: Path) -> bool:
    """Whether the newest file is old enough for its time to be told from that of a later change."""
    states = [file.stat() for file in _files(path)]
    newest = max((max(state.st_mtime_ns, state.st_ctime_ns) for state in states), default=0)
    return time.time_ns() - newest > SETTLED_NS


def read(path: Path, stamp: str) -> str | None:
    """The hash kept for a checkpoint whose stamp is `stamp`; None without one that can be relied on."""
    try:
        descriptor = os.open(_beside(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            content = json.loads(os.read(descriptor, _LONGEST).decode())
        finally:
            os.close(descriptor)
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("version") != VERSION or content.get("stamp") != stamp:
        return None
    found = content.get("content_hash")
    return found if isinstance(found, str) and _HASH.fullmatch(found) else None


def write(path: Path, stamp: str, content_hash: str) -> None:
    """Keeps a hash, in one step; does nothing where that is not possible."""
    beside = _beside(path)
    with suppress(OSError, OutputError, ValueError):
        if os.path.lexists(beside) and not stat.S_ISREG(beside.lstat().st_mode):
            beside.unlink()  # a link would be followed, wherever somebody points it
        with replaced_file(beside) as part:
            part.write_text(json.dumps({"version": VERSION, "stamp": stamp, "content_hash": content_hash}))


def _beside(path: Path) -> Path:
    whole = path.absolute()
    return whole.with_name(whole.name + SUFFIX)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())


def _stamp(file: Path) -> str:
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
