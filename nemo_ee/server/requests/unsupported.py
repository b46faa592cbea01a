# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""OpenAI's fields that this server does not have: harmless ones are dropped, others are errors with a reason."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from nemo_ee.server.answers.errors import ApiError

HARMLESS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
}
"""They do not change the text."""

_NO_TOOLS = "tools are not supported; describe them in the prompt"
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), "answers are text"),
    "best_of": ((1,), "not supported; ask for n choices and choose among them"),
    "frequency_penalty": ((0,), "not supported"),
    "function_call": (("none", "auto"), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "logit_bias": (({},), "not supported"),
    "modalities": ((["text"],), "answers are text"),
    "parallel_tool_calls": ((False, True), _NO_TOOLS),
    "prediction": ((), "not supported; early_exit.lossless=true drafts with exits"),
    "presence_penalty": ((0,), "not supported"),
    "reasoning_effort": (("none",), "not supported"),
    "response_format": (({"type": "text"},), "answers are free text"),
    "suffix": (("",), "not supported; the text before the gap is the prompt"),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "tools": (([],), _NO_TOOLS),
    "top_logprobs": ((), "of chats alone; logprobs of a completion is the number itself"),
    "verbosity": ((), "not supported"),
    "web_search_options": ((), "not supported"),
}
"""Field -> values that change nothing, and why others are refused."""
MOST_FAULTS = 5
"""Fields that one answer names."""


def supported_fields(body: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """The known fields of a request that are not null.

    Args:
        body: the request.
        known: names of supported fields.

    Raises:
        ApiError: 400, listing fields that would change the text and are not supported, and unknown ones.
    """
    known = list(known)
    faults: list[tuple[str, str]] = []
    for name, value in body.items():
        if value is None or name in known or name in HARMLESS:
            continue
        if len(faults) == MOST_FAULTS:
            break
        if name in UNSUPPORTED:
            neutral, reason = UNSUPPORTED[name]
            if not any(_same(value, harmless) for harmless in neutral):
                faults.append((name, f"{name}: {reason}; leave it out"))
        else:
            nearest = difflib.get_close_matches(name, known, 1)
            remedy = f"did you mean {nearest[0]}?" if nearest else f"known fields: {', '.join(known)}"
            faults.append((name, f"{name}: unknown field; {remedy}"))
    if faults:
        raise ApiError(400, "\n".join(text for _, text in faults), faults[0][0], "unsupported_parameter")
    return {name: value for name, value in body.items() if value is not None and name in known}


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)
