# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The header of a GGUF file, and where its tensors lie: every count, length and offset is held against the file.

Not the package gguf's reader: that one believes all of them, and makes two arrays for each entry of a list, so that it
takes long for a vocabulary, and all memory for a file that says it has one. What tensors hold, the package decodes.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_ee.errors import CheckpointError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY, _FLOAT32, _UINT32 = 8, 9, 6, 4
_SCALARS = dict(enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?")))
_SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
"""NumPy's names of the types of values, by their numbers."""

_ALIGNMENT = "general.alignment"
MOST_HEADER = 2**26
"""Bytes before the tensors: the largest vocabularies with merges, and a copy of their tokenizer.json, need half."""
MOST_ENTRIES = 2**20
"""Of one list; the largest vocabularies have a quarter of that, and a half as many merges."""
MOST_KEYS, MOST_TENSORS = 2**12, 2**16
_MOST_AXES, _LONGEST_NAME = 4, 255
_SHORTEST_KEY, _SHORTEST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file, memory-mapped.

    Attributes:
        tensor_type: how it is quantised, gguf's `GGMLQuantizationType`.
        shape: in GGUF's order, the axis first that lies together in memory.
        data: as gguf's `dequantize` takes it: the other axes, and the bytes (or numbers) of that one.
    """

    tensor_type: Any
    shape: tuple[int, ...]
    data: np.ndarray


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Values by key, and tensors by name.

    Numbers in fp32 become the shortest decimals that they are: 1e-05, where the file holds 9.999999747378752e-06.

    Raises:
        CheckpointError: it is no GGUF file, or what it says of itself cannot be true.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        if file.read(4) != MAGIC:
            raise CheckpointError(
                f"{path}: is no GGUF file (it does not begin with 'GGUF'); download it again"
            )
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _Header(path, content, size).read()
    except _Damaged as error:
        raise CheckpointError(f"{path}: is truncated or damaged ({error}); download it again") from error


class _Damaged(Exception):
    """What is wrong, without the file's name."""


class _Header:
    def __init__(self, path: Path, content: mmap.mmap, size: int):
        self.path, self.content, self.size = path, content, size
        self.end = min(size, MOST_HEADER)
        self.place = len(MAGIC)

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        version = self._number("<I")
        if version & 0xFFFF == 0:
            raise CheckpointError(
                f"{self.path}: its bytes are in the order of another machine; "
                "swap them: gguf-convert-endian FILE.gguf native"
            )
        if version not in _VERSIONS:
            raise _Damaged(f"version {version}, not {' or '.join(map(str, _VERSIONS))}")
        tensors = self._count("<Q", MOST_TENSORS, _SHORTEST_TENSOR, "tensors")
        keys = self._count("<Q", MOST_KEYS, _SHORTEST_KEY, "keys")
        values: dict[str, Any] = {}
        for _ in range(keys):
            key = self._name()
            if key in values:
                raise _Damaged(f"the key {key[:80]!r} is there twice")
            kind = self._number("<I")
            if key == _ALIGNMENT and kind != _UINT32:
                raise _Damaged(f"{key} is of the type {kind}, not {_UINT32}")
            values[key] = self._value(key, kind)
        infos = [self._tensor_info() for _ in range(tensors)]
        return values, self._tensors(infos, self._data_start(values))

    def _take(self, count: int) -> int:
        """Where the next `count` bytes begin."""
        start = self.place
        if count > self.end - start:
            where = (
                "the file"
                if self.end == self.size
                else f"what may stand before tensors, {MOST_HEADER} bytes,"
            )
            raise _Damaged(f"{count} bytes at {start}, where {where} ends at {self.end}")
        self.place += count
        return start

    def _number(self, kind: str) -> int:
        (value,) = struct.unpack_from(kind, self.content, self._take(struct.calcsize(kind)))
        return value

    def _count(self, kind: str, most: int, least_bytes: int, what: str) -> int:
        count = self._number(kind)
        if count > most or count * least_bytes > self.end - self.place:
            raise _Damaged(f"{count} {what}, for which there is no room")
        return count

    def _string(self) -> str:
        length = self._number("<Q")
        start = self._take(length)
        try:
            return self.content[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise _Damaged(f"text at {start} is no UTF-8") from error

    def _name(self) -> str:
        start, name = self.place, self._string()
        if len(name) > _LONGEST_NAME or not name.isprintable():
            raise _Damaged(f"the name at {start} has {len(name)} characters, or some that cannot be printed")
        return name

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            entries = self._number("<I")
            least = 8 if entries == _STRING else self._dtype(key, entries).itemsize
            count = self._count("<Q", MOST_ENTRIES, least, f"entries of {key[:80]}")
            if entries == _STRING:
                return [self._string() for _ in range(count)]
            return self._numbers(key, entries, count).tolist()
        value = self._numbers(key, kind, 1)[0]
        return float(str(value)) if kind == _FLOAT32 else value.item()

    def _dtype(self, key: str, kind: int) -> np.dtype:
        if kind not in _SCALARS:
            raise _Damaged(f"{key[:80]} is of the unknown type {kind}, or a list of lists")
        return np.dtype(_SCALARS[kind])

    def _numbers(self, key: str, kind: int, count: int) -> np.ndarray:
        dtype = self._dtype(key, kind)
        return np.frombuffer(self.content, dtype, count, self._take(count * dtype.itemsize)).copy()

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset."""
        name = self._name()
        axes = self._number("<I")
        if not 1 <= axes <= _MOST_AXES:
            raise _Damaged(f"{name[:80]} has {axes} axes")
        shape = struct.unpack_from(f"<{axes}Q", self.content, self._take(8 * axes))
        return name, shape, self._number("<I"), self._number("<Q")

    def _data_start(self, values: dict[str, Any]) -> int:
        alignment = values.get(_ALIGNMENT, 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise _Damaged(f"{_ALIGNMENT}={str(alignment)[:40]}, which is no power of 2")
        return -(-self.place // alignment) * alignment

    def _tensors(self, infos: list[tuple[str, tuple[int, ...], int, int]], start: int) -> dict[str, Tensor]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        found: dict[str, Tensor] = {}
        ranges = []
        for name, shape, number, offset in infos:
            if name in found:
                raise _Damaged(f"the tensor {name[:80]!r} is there twice")
            try:
                kind = GGMLQuantizationType(number)
            except ValueError as error:
                raise CheckpointError(
                    f"{self.path}: a tensor's type is unknown to the package gguf ({error}); "
                    "requantize the model with llama.cpp, for instance to Q8_0"
                ) from error
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if shape[0] % block:
                raise _Damaged(
                    f"{name[:80]} has rows of {shape[0]}, which {kind.name} cannot be divided into"
                )
            row = shape[0] // block * block_bytes
            length = row * math.prod(shape[1:])
            if not 0 < length <= self.size - start - offset:
                raise _Damaged(
                    f"{name[:80]} of shape {list(shape)} lies beyond the file's end, or has no elements"
                )
            ranges.append((offset, offset + length, name))
            data = np.frombuffer(self.content, np.uint8, length, start + offset)
            found[name] = Tensor(kind, shape, _arranged(data, kind.name, (*reversed(shape[1:]), row)))
        ranges.sort()
        for (_, end, one), (begin, _, other) in zip(ranges, ranges[1:], strict=False):
            if begin < end:
                raise _Damaged(f"{one[:80]} and {other[:80]} lie on each other")
        return found


_NUMBERS = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
"""Types whose elements gguf's `dequantize` takes as numbers; of others it takes bytes."""


def _arranged(data: np.ndarray, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    dtype = np.dtype(_NUMBERS.get(kind, "u1"))
    return data.view(dtype).reshape(*shape[:-1], shape[-1] // dtype.itemsize)
