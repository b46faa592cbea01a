# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Strategies of GGUF files: headers that say what is not so, and models with keys and tensors that are others."""

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from gguf import GGUFReader
from hypothesis import strategies as st

from tests.support.hostile_weights import gguf
from tests.support.mutations import HUGE, spoilt, spoilt_bytes, whole_numbers

SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
"""struct's forms of GGUF's types of values."""
STRING, ARRAY = 8, 9
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 14: (256, 210), 24: (1, 1), 28: (1, 8), 30: (1, 2)}
"""Of some types of tensors: elements and bytes of a block."""


def packed(keys: Any, tensors: Any) -> bytes:
    """A file of Python's values and of tensors, `{"shape": GGUF's, "kind": a number}`; strange ones as well."""
    keys, tensors = (each if isinstance(each, dict) else {} for each in (keys, tensors))
    head = [_text(str(key)) + _value(value) for key, value in keys.items() if value is not None]
    infos, content = [], b""
    for name, tensor in tensors.items():
        tensor = tensor if isinstance(tensor, dict) else {}
        shape, kind = (tensor.get(each) for each in ("shape", "kind"))
        shape = [_whole(size) for size in shape] if isinstance(shape, list) else []
        kind = _whole(kind) % 2**32
        size = _bytes(shape, kind)
        infos.append(
            _text(str(name)) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, len(content))
        )
        content += bytes(b"\x00\x3c"[place % 2] for place in range(size)) + bytes(-size % 32)
    whole = gguf(len(head), len(infos), b"".join(head + infos))
    return whole + bytes(-len(whole) % 32) + content


def _bytes(shape: list[int], kind: int) -> int:
    block, size = BLOCKS.get(kind, (1, 1))
    count = size
    for axis, length in enumerate(shape):
        count *= length // block if axis == 0 else length
    return count if count <= 2**17 else 64


def _whole(value: Any) -> int:
    return value % 2**64 if isinstance(value, int) else 0


def _text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def _kind(value: Any) -> int:
    if isinstance(value, bool):
        return 7
    if isinstance(value, int):
        return 4 if 0 <= value < 2**32 else 10 if value >= 0 else 11
    return 6 if isinstance(value, float) else STRING


def _scalar(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _text(value if isinstance(value, str) else repr(value))
    if kind == 7:
        return bytes([bool(value)])
    if kind in (6, 12):
        return struct.pack(SCALARS[kind], value if isinstance(value, float) else 0.5)
    size = struct.calcsize(SCALARS[kind])
    return (_whole(value) % 256**size).to_bytes(size, "little")


def _value(value: Any) -> bytes:
    if not isinstance(value, list):
        return struct.pack("<I", _kind(value)) + _scalar(_kind(value), value)
    kind = _kind(value[0]) if value else 4
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(_scalar(kind, each) for each in value)


@st.composite
def headers(draw: Callable) -> bytes:
    """A small file, whose counts, lengths, types and offsets may lie."""

    def said(true: int, bits: int = 64) -> int:
        return true if draw(st.integers(0, 19)) else draw(whole_numbers) % 2**bits

    def text(raw: bytes) -> bytes:
        return struct.pack("<Q", said(len(raw))) + raw

    body, names = b"", st.sampled_from((b"a", b"b", b"c", b"general.alignment", b"\xff", b"", "é".encode()))
    keys = draw(st.integers(0, 4))
    for _ in range(keys):
        kind = draw(st.sampled_from((*SCALARS, STRING, STRING, ARRAY, ARRAY, 13)))
        body += (
            text(draw(names) + draw(st.binary(max_size=2))) if draw(st.integers(0, 3)) else text(draw(names))
        )
        body += struct.pack("<I", said(kind, 32))
        if kind == ARRAY:
            entries = draw(st.sampled_from((*SCALARS, STRING, STRING, ARRAY)))
            size = struct.calcsize(SCALARS.get(entries, "<Q"))
            count = draw(st.integers(0, 4))
            body += struct.pack("<IQ", said(entries, 32), said(count))
            for _ in range(count):
                body += text(draw(st.binary(max_size=5))) if entries == STRING else draw(_bits(size))
        elif kind == STRING:
            body += text(draw(st.text(max_size=5)).encode("utf-8", "surrogatepass"))
        else:
            body += draw(_bits(struct.calcsize(SCALARS.get(kind, "<Q"))))
    tensors, data = draw(st.integers(0, 3)), b""
    for number in range(tensors):
        kind = draw(st.sampled_from((*BLOCKS, 0, 0, 1)))
        shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
        shape[0] *= BLOCKS[kind][0]
        size = _bytes(shape, kind)
        body += text(draw(st.sampled_from((b"t%d" % number, b"t%d" % number, b"t"))))
        body += struct.pack("<I", said(len(shape), 32)) + b"".join(
            struct.pack("<Q", said(each)) for each in shape
        )
        body += struct.pack("<IQ", said(kind, 32), said(len(data)))
        data += draw(_bits(size)) + bytes(-size % 32)
    whole = gguf(said(keys), said(tensors), body, draw(st.sampled_from((3, 3, 3, 3, 2, 1))))
    return whole + bytes(-len(whole) % 32) + data


def _bits(size: int) -> st.SearchStrategy:
    return st.sampled_from(
        (bytes(size), b"\xff" * size, bytes(range(1, size % 256 + 1)).ljust(size, b"\x3c")[:size])
    )


def files(honest: list[bytes]) -> st.SearchStrategy:
    """Headers, and honest files with other bytes."""
    numbers = tuple(struct.pack("<Q", number) for number in HUGE)
    tokens = (b"GGUF", b"general.alignment", *numbers)
    return headers() | headers() | spoilt_bytes(honest, tokens)


def models(keys: dict[str, Any], tensors: dict[str, Any]) -> st.SearchStrategy:
    """Pairs to be `packed` of a model with other keys, values, shapes and types."""
    sizes = st.lists(st.sampled_from((0, 1, 2, 8, 16, 32, 64, 2**31, 2**40)), min_size=1, max_size=3)
    kinds = st.fixed_dictionaries({"shape": sizes, "kind": st.sampled_from((*BLOCKS, 99))})
    lists = st.lists(st.integers(-3, 3) | st.text(max_size=3) | st.floats(width=32), max_size=4)
    return st.tuples(
        spoilt(keys) | spoilt(keys, lists | whole_numbers, 1), spoilt(tensors, kinds, 2) | st.just(tensors)
    )


def check_against_package(found: tuple[dict[str, Any], dict[str, Any]], reader: GGUFReader) -> None:
    """Values and tensors of `header.read` must be those that the package gguf finds in the same file."""
    values, tensors = found
    assert values.keys() == {key for key in reader.fields if not key.startswith("GGUF.")}
    for key, value in values.items():
        field = reader.fields[key]
        theirs = field.contents()
        np.testing.assert_equal(
            value, float(str(np.float32(theirs))) if field.types[0].name == "FLOAT32" else theirs
        )
    assert list(tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        mine = tensors[tensor.name]
        assert mine.tensor_type == tensor.tensor_type and mine.shape == tuple(map(int, tensor.shape))
        assert mine.data.tobytes() == tensor.data.tobytes() and mine.data.shape == tensor.data.shape
