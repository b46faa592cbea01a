# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Strategies of files of text, of JSON, and of indexed datasets."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.support.mutations import spoilt, spoilt_bytes, values, whole_numbers

LINES = (
    {"text": "the cat sat"},
    {"text": "é\u2028\x85 \ud83d\ude00", "n": 1.5},
    {"input": "a", "output": "b"},
    {"prompt": "Who?"},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
    {
        "messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": 1}],
        "system": "s",
    },
    {"conversations": [{"from": "User", "value": "u"}, {"from": "Assistant", "value": "a"}], "mask": "User"},
    {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}], "system": ""},
    "a plain text",
)
TOKENS = (
    b"\n", b"\r\n", b"\r", b"\n\n", b" ", b"\\u", b"\\ud800", b"\\ud83d\\ude00", b"\xff",
    b"\xef\xbb\xbf", b"\0",     b"NaN", b"1e999",    b'{"text": ', b'"', b"{", b"}", b"[", b"]", b",", b"\x1f\x8b",
    b"\xe2\x80\xa8", b"\x0c", b"\x1c", b"7" * 5000, b"-",
)  # fmt: skip


def line(value: Any, escaped: bool = False) -> bytes:
    """A line of JSON."""
    return json.dumps(value, ensure_ascii=escaped).encode("utf-8", "surrogatepass")


@st.composite
def texts(draw: Callable) -> bytes:
    """Lines of JSON, honest and spoilt, or of text, with any end."""
    made = b""
    for _ in range(draw(st.integers(0, 4))):
        value = (
            draw(st.sampled_from(LINES))
            if draw(st.booleans())
            else draw(spoilt(draw(st.sampled_from(LINES))))
        )
        made += line(value, draw(st.booleans())) + draw(
            st.sampled_from((b"\n", b"\n", b"\r\n", b"\n\n", b"\r", b""))
        )
    if draw(st.integers(0, 2)) == 0:
        made = draw(spoilt_bytes([made], TOKENS, most=3))
    return made


def whole_files() -> st.SearchStrategy:
    """`.json` files: lists and objects of records, and others."""
    honest = [json.dumps(each).encode() for each in (list(LINES), {"a": LINES[0], "b": "c"}, [], ["x"], 3)]
    records = st.lists(st.sampled_from(LINES) | values, max_size=4)
    return spoilt_bytes(honest, TOKENS, most=2) | records.map(line) | texts()


@st.composite
def datasets(draw: Callable) -> dict[str, Any]:
    """Arguments of `hostile_data.indexed_dataset`, honest but for some."""
    lengths = draw(st.lists(st.integers(0, 4), max_size=5))
    cuts = sorted(draw(st.lists(st.integers(0, len(lengths)), max_size=3)))
    said: dict[str, Any] = {
        "lengths": lengths,
        "documents": [0, *cuts, len(lengths)],
        "ids": list(range(sum(lengths))),
    }
    numbers = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 9)
    for _ in range(draw(st.integers(0, 2))):
        match draw(st.integers(0, 4)):
            case 0 if lengths:
                place = draw(st.integers(0, len(lengths) - 1))
                said["lengths"] = [*lengths[:place], draw(numbers) % 2**32 - 2**31, *lengths[place + 1 :]]
            case 1:
                said["documents"] = draw(st.lists(numbers, max_size=4))
            case 2:
                said["code"] = draw(st.integers(0, 255))
            case 3:
                said["counts"] = (draw(whole_numbers) % 2**64, draw(st.integers(0, 6)))
            case 4 if lengths:
                begins = [0, *(2 * np.cumsum(lengths[:-1], dtype=np.int64)).tolist()]
                begins[draw(st.integers(0, len(begins) - 1))] = draw(numbers)
                said["pointers"] = begins
    said["spoil"] = draw(st.none() | st.tuples(st.integers(0, 120), st.binary(min_size=1, max_size=8)))
    return said
