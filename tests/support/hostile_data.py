# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Text and indexed datasets as a stranger, or a broken disk, could hand them over; built anew where they are needed."""

import gzip
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HONEST = b'{"text": "the cat sat"}\n'
LONG_LINE = 100 * 2**20
"""Bytes of a line that takes a process that tokenizes it six gigabytes."""


@dataclass(frozen=True)
class HostileLine:
    """A line of JSONL, and what must be said of it.

    Attributes:
        line: its bytes.
        said: a pattern of the message.
    """

    line: bytes
    said: str


LINES = {
    "half of a character": HostileLine(b'{"text": "a\\ud800b"}', r"\\ud800, half of a character"),
    "its other half": HostileLine(b'{"text": "\\uDFFF"}', r"\\udfff, half of a character"),
    "number of 5,000 digits": HostileLine(
        b'{"text": "a", "n": ' + b"7" * 5000 + b"}", "number of too many digits"
    ),
    "nested lists": HostileLine(b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "nested objects": HostileLine(b'{"text": ' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "open lists": HostileLine(b"[" * 100_000, "nested too deeply|no JSON"),
    "no UTF-8": HostileLine(b'{"text": "caf\xe9"}', "must be UTF-8 text"),
    "UTF-8 of half a character": HostileLine(b'{"text": "\xed\xa0\x80"}', "must be UTF-8 text"),
    "NUL in a string": HostileLine(b'{"text": "a\0b"}', "no JSON"),
    "NUL bytes": HostileLine(b"\0" * 500, "no JSON"),
    "cut": HostileLine(b'{"text": "a', "no JSON"),
    "two values": HostileLine(b'{"text": "a"} {"text": "b"}', "no JSON"),
    "word": HostileLine(b"undefined", "no JSON"),
}
"""What is wrong in one line of JSONL, whoever reads it."""


def write_line(folder: Path, name: str) -> Path:
    """A `.jsonl` file of a good line, the hostile one, and a good one."""
    path = folder / "hostile.jsonl"
    path.write_bytes(HONEST + LINES[name].line + b"\n" + HONEST)
    return path


def fifo(folder: Path) -> Path:
    """A pipe that nobody writes to."""
    os.mkfifo(folder / "pipe.jsonl")
    return folder / "pipe.jsonl"


def device(folder: Path) -> Path:
    """A link to a device that never ends."""
    (folder / "zeros.jsonl").symlink_to("/dev/zero")
    return folder / "zeros.jsonl"


def compressed(folder: Path) -> Path:
    """A `.jsonl` file that is compressed."""
    (folder / "packed.jsonl").write_bytes(gzip.compress(HONEST))
    return folder / "packed.jsonl"


def long_line(folder: Path) -> Path:
    """A line of `LONG_LINE` bytes after a good one; takes no room on the disk."""
    path = folder / "long.jsonl"
    path.write_bytes(HONEST)
    os.truncate(path, LONG_LINE)
    return path


def long_text(folder: Path) -> Path:
    """A `.txt` file of `LONG_LINE` bytes."""
    path = folder / "long.txt"
    path.write_bytes(b"the cat\n")
    os.truncate(path, LONG_LINE)
    return path


def large_json(folder: Path) -> Path:
    """A `.json` file of a terabyte, which takes no room on the disk."""
    path = folder / "large.json"
    path.write_bytes(b"[")
    os.truncate(path, 2**40)
    return path


def folder_without_text(folder: Path) -> Path:
    """A folder that is named like a file."""
    (folder / "folder.jsonl").mkdir()
    return folder / "folder.jsonl"


def dangling(folder: Path) -> Path:
    """A link to nothing."""
    (folder / "dangling.jsonl").symlink_to(folder / "nothing.jsonl")
    return folder / "dangling.jsonl"


def circle(folder: Path) -> Path:
    """A link to itself."""
    (folder / "circle.jsonl").symlink_to(folder / "circle.jsonl")
    return folder / "circle.jsonl"


FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "pipe": (fifo, "is a pipe or a device"),
    "device": (device, "is a pipe or a device"),
    "compressed": (compressed, "is compressed; unpack it"),
    "long line": (long_line, r"line 2 has (\d+ bytes, )?more than 16777216"),
    "folder named like a file": (folder_without_text, "is a directory|directory has none"),
    "link to nothing": (dangling, "no such file|must exist"),
    "link to itself": (circle, "cannot be read|must exist"),
}
"""What is no file of lines: how it is made, and a pattern of what must be said of it."""


def folders_in_a_circle(folder: Path) -> Path:
    """A folder with a text, and links that lead back up from many depths; a pattern that looks at all of it."""
    for depth in ("a", "a/b", "a/b/c"):
        (folder / depth).mkdir()
        for number in range(3):
            (folder / depth / f"link{number}").symlink_to(folder, target_is_directory=True)
    (folder / "a" / "b" / "deep.jsonl").write_bytes(HONEST)
    return folder / "**" / "*.jsonl"


def indexed_dataset(
    prefix: Path,
    lengths: Sequence[int] = (3, 2),
    pointers: Sequence[int] | None = None,
    documents: Sequence[int] | None = None,
    code: int = 8,
    counts: tuple[int, int] | None = None,
    ids: Sequence[int] = (1, 2, 3, 4, 5),
) -> Path:
    """Megatron's indexed dataset, with what its header, its index and its data say chosen freely.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        lengths: tokens of each sequence.
        pointers: bytes at which each begins; None for where they lie.
        documents: their boundaries; None for one sequence each.
        code: of the dtype; 8 is uint16.
        counts: of sequences and boundaries that the header tells; None for the true ones.
        ids: the tokens.
    """
    if pointers is None:
        pointers = [0, *(2 * np.cumsum(lengths[:-1], dtype=np.int64))] if lengths else []
    documents = range(len(lengths) + 1) if documents is None else documents
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, *(counts or (len(lengths), len(documents))))
    body = np.array(lengths, np.int32).tobytes() + np.array(pointers, np.int64).tobytes()
    Path(f"{prefix}.idx").write_bytes(header + body + np.array(list(documents), np.int64).tobytes())
    Path(f"{prefix}.bin").write_bytes(np.array(ids, np.uint16).tobytes())
    return prefix


DATASETS: dict[str, tuple[dict, str]] = {
    "negative length": (dict(lengths=(7, -2)), "sequence 1 has -2 tokens"),
    "pointer before the file": (dict(pointers=(0, -8)), "sequence 1 lies at -8"),
    "pointer behind the file": (dict(pointers=(0, 2**62)), f"sequence 1 lies at {2**62}"),
    "pointer into another sequence": (dict(pointers=(0, 2)), "sequence 1 lies at 2"),
    "documents that go back": (dict(documents=(0, 2, 1, 2)), "its documents are not those"),
    "documents beyond the sequences": (dict(documents=(0, 1, 9)), "its documents are not those"),
    "documents that begin late": (dict(documents=(1, 2)), "its documents are not those"),
    "documents at the ends of integers": (
        dict(documents=(0, 2**63 - 1, -(2**63), 2)),
        "its documents are not those",
    ),
    "no documents": (dict(documents=()), "its documents are not those"),
    "sequences beyond the file": (dict(counts=(2**62, 3)), "truncated or damaged"),
    "documents beyond the file": (dict(counts=(2, 2**61)), "truncated or damaged"),
    "code of a dtype of numbers that are no integers": (dict(code=6), "not the index"),
    "code of no dtype": (dict(code=77), "not the index"),
    "fewer tokens than the index says": (dict(ids=(1, 2)), "is truncated: 4 bytes, its index says 10"),
    "token beyond the vocabulary": (dict(ids=(1, 2, 3, 4, 65535)), "has 1 to 65535"),
}
"""Indexed datasets of five tokens that must be refused with a vocabulary of 100: changes, and what must be said."""
