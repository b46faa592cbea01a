# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Requests for text, right ones and ones that are nearly right, as hypothesis makes them."""

import json
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

from nemo_ee.server.requests.unsupported import HARMLESS, UNSUPPORTED
from tests.support.fake_session import EXIT_LAYERS
from tests.support.server import LIMITS
from tests.support.tiny_gpt import VOCABULARY

WORDS = st.integers(0, 194).map(lambda n: f"w{n}")
MOST_GROWN = 300_000
"""Characters of a field that has grown: three of them are less than a server's `max_body_bytes`."""
SENTENCES = st.lists(WORDS, min_size=1, max_size=12).map(" ".join)
IDS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=LIMITS["context_length"])
PROMPTS = (
    SENTENCES | IDS | st.lists(SENTENCES, min_size=1, max_size=2) | st.lists(IDS, min_size=1, max_size=2)
)
SHORT = st.lists(WORDS, min_size=1, max_size=3).map(" ".join)
CONTENTS = SHORT | st.lists(SHORT.map(lambda text: {"type": "text", "text": text}), max_size=3)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": CONTENTS},
        optional={"refusal": st.none(), "name": st.none()},
    ),
    min_size=1,
    max_size=3,
)
LAYERS = EXIT_LAYERS[:-1]
EXITS = st.sets(st.sampled_from(LAYERS)).map(sorted)
EXIT_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "threshold": st.none() | st.floats(0, 1),
        "exits": st.none() | EXITS,
        "max_pending": st.none() | st.integers(0, 2**40),
        "lossless": st.none() | st.just(False),
        "always": st.none() | st.booleans(),
        "kv_policy": st.just("catch_up"),
        "confidence": st.just("max_probability"),
    },
).filter(
    lambda given: (
        given.get("exits") != []  # of no exit nothing is asked
        or (given.get("threshold") is given.get("max_pending") is None and not given.get("always"))
    )
) | st.just({"lossless": True, "max_pending": None})
STOP = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=256)
SHARED: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.none() | st.integers(1, 30) | st.integers(1, 10**20 - 1),
    "min_tokens": st.none() | st.just(0),
    "repetition_penalty": st.none() | st.floats(0.01, 100),
    "stop_token_ids": st.none() | st.lists(st.integers(0, VOCABULARY - 1), max_size=128),
    "ignore_eos": st.none() | st.booleans(),
    "temperature": st.none() | st.sampled_from([0, 0.0, 1, 2]) | st.floats(1e-6, 2),
    "top_p": st.none() | st.floats(0, 1, exclude_min=True),
    "top_k": st.none() | st.integers(0, 2**63 - 1),
    "n": st.none() | st.integers(1, 2),
    "stop": st.none() | STOP | st.lists(STOP, max_size=16),
    "seed": st.none() | st.integers(-(2**63), 2**63 - 1),
    "stream": st.none() | st.booleans(),
    "early_exit": st.none() | st.booleans() | EXIT_OPTIONS,
}


def json_values(numbers: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Anything that JSON can hold, with such numbers."""
    scalars = st.none() | st.booleans() | numbers | st.text(max_size=20) | st.just("\ud800")
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=8,
    )


PLAIN = json_values(st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False))
ANYTHING = json_values(
    st.integers(-(2**80), 2**80) | st.floats() | st.sampled_from([10**4000, -(10**25), 1e308, -0.0])
)
"""Also what Python alone takes for JSON."""


@st.composite
def right_requests(draw: st.DrawFn, chat: bool) -> dict[str, Any]:
    """Requests that a server of `tests.support.server` accepts."""
    required: dict[str, Any] = {"model": st.just("tiny")}
    optional = dict(SHARED)
    if chat:
        required["messages"] = MESSAGES
        optional["max_completion_tokens"] = optional["max_tokens"]
        optional["logprobs"] = st.none() | st.booleans()
    else:
        required["prompt"] = PROMPTS
        optional["echo"] = st.none() | st.booleans()
        optional["max_tokens"] |= st.just(0)
        optional["logprobs"] = st.none() | st.integers(0, 5)
    optional |= dict.fromkeys(HARMLESS, PLAIN)
    optional |= {name: st.sampled_from([*neutral, None]) for name, (neutral, _) in UNSUPPORTED.items()}
    names = draw(st.lists(st.sampled_from(sorted(optional)), max_size=6, unique=True))
    request = draw(st.fixed_dictionaries({**required, **{name: optional[name] for name in names}}))
    if request.get("max_tokens") is not None:
        request.pop("max_completion_tokens", None)
    if chat and request.get("logprobs") and draw(st.booleans()):
        request["top_logprobs"] = draw(st.integers(0, 20))
    if request.get("stream") and draw(st.booleans()):
        request["stream_options"] = {"include_usage": draw(st.booleans())}
    return request


@st.composite
def nearly_right_requests(draw: st.DrawFn, chat: bool) -> Any:
    """The same with one to three changes."""
    request: Any = deepcopy(draw(right_requests(chat)))
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted([*request, *SHARED, "model", "prompt", "messages"])))
        change = draw(st.sampled_from(["replace", "drop", "swap", "wrap", "rename", "grow", "inside"]))
        value = request.get(name)
        if change == "drop":
            request.pop(name, None)
        elif change == "swap":
            others = sorted(request) or [name]  # all may be dropped
            request[name] = request.get(draw(st.sampled_from(others)))
        elif change == "wrap":
            request[name] = draw(st.sampled_from([[value], {"text": value}, [[value]], str(value)]))
        elif change == "rename":
            request[name[: draw(st.integers(0, len(name)))] + draw(st.text(max_size=3))] = value
        elif change == "grow" and isinstance(value, list | str):
            times = draw(st.sampled_from([2, 50, 2000]))
            request[name] = value * min(times, MOST_GROWN // len(json.dumps(value)))
        elif change == "inside" and isinstance(value, dict):
            value[draw(st.sampled_from(sorted([*value, "exits", "threshold"])))] = draw(ANYTHING)
        else:
            request[name] = draw(ANYTHING)
    return request


@st.composite
def bodies(draw: st.DrawFn, chat: bool) -> bytes:
    """Nearly right requests as bytes, of which some are cut or changed."""
    text = json.dumps(draw(nearly_right_requests(chat)), ensure_ascii=draw(st.booleans()))
    body = bytearray(text.encode(errors="surrogatepass"))
    if draw(st.integers(0, 9)) == 0:
        place = draw(st.integers(0, len(body) - 1))
        body[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(body)
