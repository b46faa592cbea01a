# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Reading the index (``.idx``) of Megatron's indexed dataset and checking it against its data (``.bin``).

megatron-core's own reader trusts the files: a truncated one becomes an error deep inside numpy, or wrong
tokens.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemo_ee.errors import DataError

_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the token dtype, number of sequences, number of document boundaries."""
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""Codes of integer dtypes in megatron.core.datasets.indexed_dataset.DType (core 0.13)."""
_BLOCK = 1 << 20


@dataclass(frozen=True)
class IndexedFile:
    """An indexed dataset whose two files fit together.

    Attributes:
        prefix: path without ``.bin`` and ``.idx``.
        dtype: of the token ids.
        sequence_lengths: tokens of each sequence, int32 [sequences]. Megatron splits by these. Preprocessing
            writes one sequence per document.
    """

    prefix: str
    dtype: np.dtype
    sequence_lengths: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens in the whole file."""
        return int(self.sequence_lengths.sum(dtype=np.int64))

    def token_ids(self) -> np.ndarray:
        """All token ids in file order, memory-mapped and read-only, [tokens]."""
        if self.tokens == 0:
            return np.empty(0, dtype=self.dtype)
        return np.memmap(f"{self.prefix}.bin", dtype=self.dtype, mode="r")

    def sequence_range(self, begin: int, end: int) -> slice:
        """The slice of :meth:`token_ids` that sequences ``begin`` (included) to ``end`` (excluded) cover."""
        ends = np.concatenate(([0], np.cumsum(self.sequence_lengths, dtype=np.int64)))
        return slice(int(ends[begin]), int(ends[end]))

    def blocks(self, part: slice, size: int = 1 << 24) -> Iterator[np.ndarray]:
        """Yields the token ids of ``part`` in pieces of at most ``size``, to hold little in memory."""
        ids = self.token_ids()
        for start in range(part.start, part.stop, size):
            yield ids[start : min(start + size, part.stop)]

    def spread_blocks(self, part: slice, tokens: int, size: int = 1 << 20) -> Iterator[np.ndarray]:
        """As :meth:`blocks`; of more than ``tokens``, so many at most, in blocks of ``size`` evenly spread."""
        if part.stop - part.start <= tokens:
            yield from self.blocks(part)
            return
        ids, size = self.token_ids(), max(1, min(size, tokens))
        for start in np.linspace(part.start, part.stop - size, max(1, tokens // size)).astype(np.int64):
            yield ids[start : start + size]


def open_indexed_file(prefix: str) -> IndexedFile:
    """Opens an indexed dataset and checks that it is whole.

    Args:
        prefix: path without ``.bin`` and ``.idx``.

    Raises:
        DataError: a file is missing or unreadable, is not an index of version 1, or is shorter or longer
            than the other one says. The message says which, not how to go on.
    """
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise DataError(f"{path} does not exist")
    idx_size = idx_path.stat().st_size
    with idx_path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise DataError(f"{idx_path} is truncated: {idx_size} bytes are less than its header")
    magic, version, code, sequences, boundaries = _HEADER.unpack(header)
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise DataError(f"{idx_path} is not the index of a Megatron dataset of token ids")
    needed = _HEADER.size + sequences * (4 + 8) + boundaries * 8
    if idx_size not in (needed, needed + sequences):  # a multimodal index has one more byte per sequence
        raise DataError(f"{idx_path} is truncated or damaged: {idx_size} bytes instead of {needed}")
    if sequences >= 1 << 31:
        raise DataError(f"{idx_path} is damaged: it says that it has {sequences} sequences")
    lengths = np.fromfile(idx_path, dtype=np.int32, count=sequences, offset=_HEADER.size)
    if sequences and lengths.min() < 0:
        raise DataError(f"{idx_path} is damaged: sequence {int(lengths.argmin())} has {lengths.min()} tokens")
    file = IndexedFile(str(prefix), np.dtype(_DTYPES[code]), lengths)
    bin_size, expected = bin_path.stat().st_size, file.tokens * file.dtype.itemsize
    if bin_size != expected:
        state = "truncated" if bin_size < expected else "not the data of this index"
        raise DataError(f"{bin_path} is {state}: {bin_size} bytes, its index says {expected}")
    _check_pointers(idx_path, file)
    _check_boundaries(idx_path, sequences, boundaries)
    return file


def _check_pointers(idx_path: Path, file: IndexedFile) -> None:
    """Where megatron-core reads each sequence must be where it lies: one after the other."""
    count, start = len(file.sequence_lengths), 0
    for first in range(0, count, _BLOCK):
        lengths = file.sequence_lengths[first : first + _BLOCK].astype(np.int64)
        ends = start + np.cumsum(lengths) * file.dtype.itemsize
        pointers = _numbers(idx_path, 4 * count + 8 * first, len(lengths))
        wrong = np.flatnonzero(pointers != ends - lengths * file.dtype.itemsize)
        if len(wrong):
            raise DataError(
                f"{idx_path} is damaged: sequence {first + wrong[0]} lies at {pointers[wrong[0]]}"
            )
        start = int(ends[-1])


def _check_boundaries(idx_path: Path, sequences: int, count: int) -> None:
    """Documents must begin at the first sequence, end at the last, and none before the one before it."""
    last = 0
    for first in range(0, count, _BLOCK):
        block = _numbers(idx_path, 12 * sequences + 8 * first, min(_BLOCK, count - first))
        if (first == 0 and block[0] != 0) or (block < np.append(last, block[:-1])).any():
            break
        last = int(block[-1])
    else:
        if count and last == sequences:
            return
    raise DataError(f"{idx_path} is damaged: its documents are not those of its {sequences} sequences")


def _numbers(idx_path: Path, offset: int, count: int) -> np.ndarray:
    return np.fromfile(idx_path, dtype=np.int64, count=count, offset=_HEADER.size + offset)
