# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Strategies that take something honest and spoil it: bytes, and lists, dictionaries and objects of plain values."""

import copy
import struct
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

NUMBERS = (0, 1, 2, 3, 7, 8, 31, 255, 511, 512, 513, 65_535, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40)
HUGE = (*NUMBERS, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
whole_numbers = st.sampled_from(HUGE) | st.integers(-(2**63), 2**64 - 1) | st.integers(-16, 600)
words = st.sampled_from(
    (
        "",
        "a",
        "../x",
        "/",
        ".",
        "..",
        "\0",
        "é",
        "x" * 200,
        "\n",
        "\x1b[2J",
        "\udc80",
        "true",
        "1e9",
        "~",
        "${a}",
    )
)
scalars = st.none() | st.booleans() | whole_numbers | st.floats(width=32) | words | st.text(max_size=12)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(words | st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)
_PACKED = ("<B", "<H", "<I", "<Q", ">I", ">Q")


@st.composite
def spoilt_bytes(
    draw: Callable, honest: Sequence[bytes], tokens: Sequence[bytes] = (b"\0",), most: int = 6
) -> bytes:
    """Bytes of one of `honest`, or of two, cut, repeated, swapped, overwritten; `tokens` mean something in them."""
    data = bytearray(draw(st.sampled_from(honest)))
    for _ in range(draw(st.integers(0, most))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from((1, 2, 4, 8, 16, 64, 512, 4096))))
        match draw(st.integers(0, 7)):
            case 0:
                del data[start:end]
            case 1:
                data[end:end] = data[start:end] * draw(st.sampled_from((1, 2, 9)))
            case 2:
                data[start : start + 1] = draw(st.binary(min_size=1, max_size=1))
            case 3:
                kind = draw(st.sampled_from(_PACKED))
                number = draw(whole_numbers) % 256 ** struct.calcsize(kind)
                data[start : start + struct.calcsize(kind)] = struct.pack(kind, number)
            case 4:
                data[start:start] = draw(st.sampled_from(tokens))
            case 5:
                del data[draw(st.sampled_from((start, len(data)))) :]
            case 6:
                other = draw(st.sampled_from(honest))
                cut = draw(st.integers(0, len(other)))
                data[start:] = other[cut:]
            case 7:
                other_start = draw(st.integers(0, len(data)))
                piece = bytes(data[start:end])
                data[start:end] = data[other_start : other_start + len(piece)]
                data[other_start : other_start + len(piece)] = piece
    return bytes(data)


@st.composite
def spoilt(draw: Callable, honest: Any, strange: st.SearchStrategy = values, most: int = 3) -> Any:
    """A copy of lists and dictionaries in each other in which some parts are others, gone, doubled or swapped."""
    whole = [copy.deepcopy(honest)]
    for _ in range(draw(st.integers(0, most))):
        holder, key = _place(draw, whole)
        match draw(st.integers(0, 5)):
            case 0 | 1:
                holder[key] = draw(strange)
            case 2 if holder is not whole:
                del holder[key]
            case 3 if isinstance(holder, list) and holder is not whole:
                holder.insert(key, copy.deepcopy(holder[key]))
            case 4 if isinstance(holder, dict):
                holder[draw(words | st.sampled_from(sorted(map(str, holder))))] = holder[key]
            case _:
                other, at = _place(draw, whole)
                if holder is not whole and other is not whole:
                    holder[key], other[at] = copy.deepcopy(other[at]), copy.deepcopy(holder[key])
    return whole[0]


def _place(draw: Callable, whole: list) -> tuple[Any, Any]:
    """A list or dictionary somewhere within, and a key of it."""
    holder, key = whole, 0
    while isinstance(holder[key], list | dict) and holder[key] and draw(st.integers(0, 5)):
        holder = holder[key]
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        key = draw(st.sampled_from(keys))
    return holder, key
