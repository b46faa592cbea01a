# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""By how much a confidence may be off that is read from 8-bit rows: for any rows and states, and no less in the worst.

Suffixes: N states, R rows, H features.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_ee.decoding.cpu.cpu_kernels import run_head
from nemo_ee.decoding.cpu.kernels.readout import Head
from nemo_ee.decoding.cpu.lean_weights import HEAD_KIND, lean_linear
from tests.support.fuzz import EXAMPLES, MANY

HALF_STEP = 0.51
"""Of a row's step, which is its largest weight over 127: half of it, and the scale's own rounding to bfloat16."""
LEAST = float(torch.finfo(torch.float32).tiny)
"""No step is smaller."""
ROWS = {
    "usual": lambda rng, shape: rng.standard_normal(shape),
    "one large weight": lambda rng, shape: np.where(
        np.arange(shape[1]) == 0, 1e3, rng.standard_normal(shape)
    ),
    "between two steps": lambda rng, shape: np.where(
        np.arange(shape[1]) == 0, 127.0, rng.integers(-126, 126, shape) + 0.5
    ),
    "just off what bfloat16 has": lambda rng, shape: (
        rng.choice([-1, 1], shape) * 127 * (1 + 2.0**-8 - 2.0**-13)
    ),
    "of very different lengths": lambda rng, shape: (
        rng.standard_normal(shape) * 10.0 ** rng.integers(-8, 9, (shape[0], 1))
    ),
    "of very different features": lambda rng, shape: (
        rng.standard_normal(shape) * 10.0 ** rng.integers(-8, 9, (1, shape[1]))
    ),
    "below normal numbers": lambda rng, shape: rng.standard_normal(shape) * 1e-40,
    "huge": lambda rng, shape: rng.standard_normal(shape) * 1e30,
    "all the same": lambda rng, shape: np.full(shape, rng.standard_normal()),
    "zeros": lambda rng, shape: np.zeros(shape),
    "nearly equal": lambda rng, shape: rng.standard_normal((1, shape[1])) + 1e-3 * rng.standard_normal(shape),
}
STATES = ("usual", "where the errors of a row point", "one feature", "zeros")


def read(weight, x):
    """Logits and confidences of a projection in full and in 8 bits, and what its 8-bit rows are."""
    none, dtype = torch.empty(0, dtype=weight.dtype).numpy(), weight.dtype
    found = []
    for kind in ("native", HEAD_KIND):
        linear = lean_linear(weight, None, dtype, kind)
        answer = run_head(Head.plain(linear.kernels[0][1], none, np.empty(0, np.int64)), len(weight), x)
        found.append((answer.logits.double(), answer.confidence.double(), answer.tokens))
    return *found, linear.quantised.double() * linear.scales.double()[:, None]


def state(kind, off, rng):
    """[H], for rows that are off by [R, H]."""
    count = off.shape[1]
    if kind == "where the errors of a row point":
        return np.sign(off[rng.integers(len(off))])
    if kind == "one feature":
        return np.eye(count)[rng.integers(count)]
    return rng.standard_normal(count) if kind == "usual" else np.zeros(count)


CASES = {
    "seed": st.integers(0, 2**32 - 1),
    "rows": st.sampled_from(list(ROWS)),
    "states": st.sampled_from(STATES),
    "shape": st.tuples(st.integers(1, 40), st.integers(1, 70)),
    "change": st.floats(1e-4, 8),
    "dtype": st.sampled_from([torch.float32, torch.float64]),
}


@pytest.mark.parametrize("examples", EXAMPLES)
def test_confidences_are_within_the_bound(examples):
    options = settings(max_examples=examples, deadline=None, database=None, derandomize=examples < MANY)
    options(given(**CASES)(check_bound))()


def check_bound(seed, rows, states, shape, change, dtype):
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(ROWS[rows](rng, shape)).to(dtype)
    most = weight.double().abs().amax(1).clamp_min(127 * LEAST)
    quantised = read(weight, torch.zeros(1, shape[1], dtype=dtype))[2]
    off = weight.double() - quantised
    assert (off.abs() <= HALF_STEP * most[:, None] / 127).all(), "a weight is off by half a step at most"

    x = torch.from_numpy(state(states, off.numpy(), rng))
    reach = (HALF_STEP * most / 127).max() * x.abs().sum()
    if reach > 0:  # so that logits may be off by about `change`
        x = x * min(change / float(reach), 1e30)
    x = x.to(dtype)[None]
    (full, whole, best), (rough, eight, chosen), _ = read(weight, x)
    length = (x.double().abs() @ weight.double().abs().T).max() + (x.double().abs() @ quantised.abs().T).max()
    rounding = 4 * (shape[1] + 8) * torch.finfo(dtype).eps * float(length + 1)
    d = float((HALF_STEP * most / 127).max() * x.double().abs().sum()) + rounding
    assert (full - rough).abs().max() <= d
    bound = math.tanh(d / 2) + 64 * torch.finfo(dtype).eps
    assert abs(whole - eight).max() <= bound
    if shape[0] > 1:
        first, second = full.topk(2).values[0].tolist()
        assert first - second <= 2 * d or best.tolist() == chosen.tolist()
        margins = [logits.softmax(-1).topk(2).values[0].diff().abs() for logits in (full, rough)]
        assert abs(margins[0] - margins[1]) <= 2 * bound, "the margin: twice that"


@pytest.mark.parametrize("d", [0.01, 0.2, 1.0, 3.0])
def test_no_smaller_bound_holds(d):
    """One row has half a step less in 8 bits and three others half a step more, all in the state's direction."""
    weight = torch.full((4, 65), 1.5, dtype=torch.float64)  # to 2
    weight[0] = 0.5  # to 0
    weight[:, 0] = torch.tensor([127.0, -127, -127, -127])
    x = torch.full((1, 65), d / 32, dtype=torch.float64)
    x[0, 0] = (3 * d + math.log(3)) / 254
    (_, whole, _), (_, eight, _), _ = read(weight, x)
    bound = math.tanh(HALF_STEP * float(x.sum()) / 2)
    assert float(abs(whole - eight)) <= bound
    if d < math.log(3):  # the row is still the highest one
        assert float(whole - eight) == pytest.approx(math.tanh(d / 2), rel=1e-6)
        assert float(whole - eight) > 0.75 * bound
