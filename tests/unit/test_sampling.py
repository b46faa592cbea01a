# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Drawing tokens without sorting or summing the vocabulary, against the plain way that does both."""

import numpy as np
import pytest
import torch

from nemo_ee.decoding.cpu import nucleus
from nemo_ee.decoding.request import SamplingOptions
from nemo_ee.decoding.sampling import draw, draw_tokens, keep_most_probable, token_distribution
from tests.support.plain_sampling import plain_distribution, plain_draw

SIZE = 4096
KINDS = {
    "random": lambda n, make: 3 * torch.randn(n, SIZE, generator=make),
    "peaked": lambda n, make: 12 * torch.randn(n, SIZE, generator=make),
    "flat": lambda n, make: 1e-3 * torch.randn(n, SIZE, generator=make),
    "a few equal": lambda n, make: (2 * torch.randn(n, SIZE, generator=make)).round(),
    "bfloat16's": lambda n, make: (3 * torch.randn(n, SIZE, generator=make)).bfloat16().float(),
    "all equal": lambda n, make: torch.zeros(n, SIZE),
    "one token": lambda n, make: torch.full((n, SIZE), -200.0).index_fill(1, torch.tensor([17]), 90.0),
    "mostly forbidden": lambda n, make: torch.randn(n, SIZE, generator=make).index_fill(
        1, torch.randperm(SIZE, generator=make)[: SIZE - 9], float("-inf")
    ),
}
OPTIONS = [
    (0, 1.0),
    (0, 0.0),
    (0, 0.9),
    (0, 0.5),
    (0, 0.999),
    (0, 1e-6),
    (40, 1.0),
    (1, 1.0),
    (40, 0.9),
    (3000, 0.7),
]
OPTIONS += [(-1, 0.95), (SIZE, 0.3), (10 * SIZE, 0.3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_plain_way_at_equal_uniforms(kind, dtype):
    make = torch.Generator().manual_seed(5)
    logits = KINDS[kind](5, make).to(dtype)
    given, rows, others = logits.clone(), 0, 0
    for top_k, top_p in OPTIONS:
        for temperature in (1.0, 0.7):
            options = SamplingOptions(False, temperature, top_k, top_p)
            expected = plain_distribution(logits, temperature, top_k, top_p)
            found = token_distribution(logits, options)
            assert found.dtype == dtype
            same = ((found > 0) == (expected > 0)).all(-1)
            rows, others = rows + len(same), others + int((~same).sum())
            assert same.all() or dtype == torch.float32
            if not same.all():  # sums in float32 round, and do so by their order
                exact = plain_distribution(logits.double(), temperature, top_k, 1.0)
                assert is_nucleus(found > 0, exact, top_p)[~same].all() and 0 < top_p < 1
            close = dict(rtol=2e-5 if dtype == torch.float32 else 1e-12, atol=0)
            torch.testing.assert_close(found[same], expected[same], **close)
            for uniforms in torch.rand(6, len(logits), generator=make, dtype=torch.float64).tolist():
                tokens = draw_tokens(logits, options, uniforms)
                assert tokens[same].equal(plain_draw(expected, uniforms)[same]), (top_k, top_p, temperature)
                assert tokens.equal(draw(found, uniforms)), "drafts are drawn as other tokens are"
    assert logits.equal(given), "inputs stay as they are"
    assert others <= 0.1 * rows


def is_nucleus(kept, exact, top_p, rounding=2e-6):
    """[N]: whether the most probable tokens are kept, and no more of them than it takes, up to float32's rounding."""
    mass, least = (exact * kept).sum(-1), exact.masked_fill(~kept, 2.0).min(-1).values
    ordered = exact.masked_fill(kept, 0.0).max(-1).values <= least
    return ordered & (mass >= top_p - rounding) & (mass - least <= top_p + rounding)


@pytest.mark.parametrize("first", ["few", "all"])
def test_where_the_first_floor_holds_too_little_the_next_one_is_used(first, monkeypatch):
    monkeypatch.setattr(
        nucleus, "FEW", 1e-9 if first == "few" else 1e9
    )  # far above all weights, or below them
    make = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(4, SIZE, generator=make, dtype=torch.float64)
    for top_p in (0.1, 0.9, 0.9999999):
        expected = plain_distribution(logits, 1.0, 0, top_p) > 0
        assert (token_distribution(logits, SamplingOptions(False, top_p=top_p)) > 0).equal(expected)


def test_only_tokens_that_may_be_drawn_are_sorted(monkeypatch):
    sizes = []
    monkeypatch.setattr(nucleus.np, "argsort", lambda x, kind: sizes.append(len(x)) or np.lexsort([x]))
    logits = 3 * torch.randn(3, 50_000, generator=torch.Generator().manual_seed(0))
    draw_tokens(logits, SamplingOptions(False, top_p=0.9), [0.1, 0.5, 0.9])
    assert len(sizes) == 3 and max(sizes) < 6_000


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.9)])
def test_logits_that_are_no_numbers_give_a_token_of_the_vocabulary_and_no_probabilities(bad, top_k, top_p):
    logits = torch.zeros(1, 50)
    logits[0, 7] = bad
    options = SamplingOptions(False, top_k=top_k, top_p=top_p)
    assert 0 <= int(draw_tokens(logits, options, [0.3])) < 50
    assert not bool(token_distribution(logits, options).isfinite().all())


def test_the_gpus_way_keeps_the_same_tokens():
    make = torch.Generator().manual_seed(2)
    for kind in KINDS:
        logits = KINDS[kind](3, make)
        for top_k, top_p in OPTIONS:
            kept = keep_most_probable(logits, top_k, top_p) > float("-inf")
            expected = plain_distribution(logits, 1.0, top_k, top_p) > 0
            counts = (
                logits - logits.max(-1, keepdim=True).values > -80
            )  # others' probabilities are next to none
            assert (kept & counts).equal(expected & counts), (kind, top_k, top_p)
