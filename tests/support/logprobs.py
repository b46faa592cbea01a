# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Log-probabilities of two outputs of `model.generate`, or of an output and rows of a reference."""

from typing import Any

import pytest
from torch import Tensor


def same_logprobs(one: dict[str, Any], other: dict[str, Any], **tolerance: float) -> None:
    """Asserts that two outputs tell the same of all tokens; tolerances are those of `pytest.approx`."""
    for name in ("logprobs", "prompt_logprobs"):
        assert (one.get(name) is None) == (other.get(name) is None), name
        for mine, theirs in zip(one.get(name) or [], other.get(name) or [], strict=True):
            for a, b in zip(mine, theirs, strict=True):
                assert (a is None) == (b is None), name
                if a is not None:
                    near = {key: pytest.approx(b[key], **tolerance) for key in ("logprob", "top_logprobs")}
                    assert a == {**b, **near}


def check_logprobs(
    entries: list[dict[str, Any]], rows: Tensor, tokens: list[int], top: int, atol: float = 1e-4
) -> None:
    """Asserts that entries of an output are what a reference says.

    Args:
        entries: of n tokens.
        rows: [n, V] log-probabilities.
        tokens: [n] ids.
        top: how many were asked for.
        atol: nats.
    """
    assert [entry["token_id"] for entry in entries] == tokens
    for entry, row, token in zip(entries, rows, tokens, strict=True):
        assert entry["logprob"] == pytest.approx(row[token].item(), abs=atol)
        best = row.topk(top).values.tolist()
        assert entry["top_logprobs"] == pytest.approx(best, abs=atol)
        assert row[entry["top_token_ids"]].tolist() == pytest.approx(best, abs=atol)
