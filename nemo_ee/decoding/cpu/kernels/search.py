# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The most probable token of an output layer from 8-bit rows, proven to be the layer's own.

The 8-bit logit of row i differs from the layer's by at most |x| slack_i (`slack_of`). So the layer's highest row is
among those whose logit + |x| slack reaches the best logit - |x| slack; these few are computed anew in float64. If one
of them stays ahead of all others by more than the layer's own rounding can move them, it is the layer's choice,
in whatever order that sums up. Else, and where numbers are not finite, it is for the layer itself to say.

Suffixes: N tokens, H hidden size, R rows.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import prange

from nemo_ee.decoding.cpu.kernels.compiled import compiled, widened
from nemo_ee.decoding.cpu.kernels.mlp import copy
from nemo_ee.decoding.cpu.kernels.norm import Norm, normalise_all
from nemo_ee.decoding.cpu.kernels.products import Linear, multiply
from nemo_ee.decoding.cpu.kernels.readout import sum_of_exponentials

MOST_CANDIDATES = 256
"""Of one thread and token; where more are as close, the layer itself is as fast."""
UNDERFLOW = 1e-30
"""More than all that products and sums lose where they are too small for normal numbers, or are set to zero there."""


class Search(NamedTuple):
    """An output layer to be searched.

    Attributes:
        rough: [R, H] in 8 bits.
        exact: [R, H], the layer's own weight, see `widened`.
        slack: [R] float32, see `slack_of`.
        rounding: [R] float32, see `slack_of`.
        norm: that stands before it.
    """

    rough: Linear
    exact: np.ndarray
    slack: np.ndarray
    rounding: np.ndarray
    norm: Norm


@compiled(parallel=True)
def search(layer, emittable, x, logits, token, sure, settled, threads):
    """Fills in the most probable token after each state, where that is proven.

    Args:
        layer: a `Search`.
        emittable: rows that stand for a token.
        x: [N, H].
        logits: [N, R] memory for 8-bit logits.
        token: [N] the layer's highest emittable row.
        sure: [N] its probability by the 8-bit logits.
        settled: [N] whether `token` is proven.
        threads: that share the work.
    """
    tokens, hidden = len(x), x.shape[1]
    kind, none = x.dtype.type, np.empty(0, x.dtype)
    state = np.empty((tokens, hidden), x.dtype)
    if layer.norm.gain.size:
        normalise_all(x, state, layer.norm)
    else:
        copy(x, state)
    length = np.empty(tokens, np.float64)
    for t in range(tokens):
        squares = 0.0
        for j in range(hidden):
            squares += np.float64(state[t, j]) * np.float64(state[t, j])
        length[t] = math.sqrt(squares) * (1 + 1e-9)
    weight, scale, _ = layer.rough
    exact, slack, rounding = layer.exact, layer.slack, layer.rounding  # threads take arrays alone
    rows = len(weight)
    floors = np.empty((threads, tokens), np.float64)
    tops, sums = np.empty((threads, tokens), x.dtype), np.empty((threads, tokens), x.dtype)
    for c in prange(threads):
        first, last = c * rows // threads, (c + 1) * rows // threads
        multiply(weight, scale, none, state, logits, first, last)
        last = min(last, emittable)
        for t in range(tokens):
            floors[c, t], tops[c, t] = _floor(logits[t], slack, length[t], first, last)
            sums[c, t] = sum_of_exponentials(logits[t], first, last, tops[c, t])
    first_of = np.full((threads, tokens), -np.inf)
    first_low = np.full((threads, tokens), -np.inf)
    rival = np.full((threads, tokens), -np.inf)
    where = np.full((threads, tokens), -1, np.int64)
    counts = np.zeros((threads, tokens), np.int64)
    for c in prange(threads):
        first, last = c * rows // threads, min((c + 1) * rows // threads, emittable)
        for t in range(tokens):
            floor = floors[0, t]
            for other in range(1, threads):
                floor = max(floor, floors[other, t])
            for i in range(first, last):
                if logits[t, i] + length[t] * slack[i] + UNDERFLOW < floor:
                    continue
                counts[c, t] += 1
                if counts[c, t] > MOST_CANDIDATES:
                    break
                value = _exact(exact[i], state[t])
                spread = length[t] * rounding[i] + UNDERFLOW
                if value > first_of[c, t]:
                    if where[c, t] >= 0:
                        rival[c, t] = max(rival[c, t], first_of[c, t] * 2 - first_low[c, t])
                    first_of[c, t], first_low[c, t], where[c, t] = value, value - spread, i
                else:
                    rival[c, t] = max(rival[c, t], value + spread)
    for t in range(tokens):
        best, many, finite = 0, False, math.isfinite(length[t])
        for c in range(threads):
            many = many or counts[c, t] > MOST_CANDIDATES
            finite = finite and (math.isfinite(tops[c, t]) or c * rows // threads >= emittable)
            if first_of[c, t] > first_of[best, t]:
                best = c
        ahead = first_low[best, t]
        proven = finite and not many and where[best, t] >= 0 and math.isfinite(ahead)
        for c in range(threads):
            if c != best and where[c, t] >= 0:
                proven = proven and first_of[c, t] * 2 - first_low[c, t] < ahead
            proven = proven and rival[c, t] < ahead
        settled[t], token[t], sure[t] = proven, where[best, t], kind(0)
        if proven:
            top = tops[0, t]
            for c in range(1, threads):
                top = max(top, tops[c, t])
            total = kind(0)
            for c in range(threads):
                if tops[c, t] > -np.inf:
                    total += sums[c, t] * kind(math.exp(tops[c, t] - top))
            sure[t] = min(kind(1), kind(math.exp(logits[t, where[best, t]] - top)) / total)


@compiled
def _floor(logits, slack, length, first, last):
    """What the layer's highest logit has at least, and the highest 8-bit one; NaN for the latter if one is no number or
    infinite."""
    floor, top = -np.inf, logits.dtype.type(-np.inf)
    lowest = logits.dtype.type(np.inf)
    for i in range(first, last):
        floor = max(floor, logits[i] - length * slack[i] - UNDERFLOW)
        lowest = min(lowest, logits[i])
        if logits[i] > top or logits[i] != logits[i]:
            top = logits[i]
    return floor, top if lowest > -np.inf else logits.dtype.type(np.nan)


@compiled
def _exact(row, x):
    """A product in float64."""
    total = 0.0
    for j in range(len(x)):
        total += widened(row[j], 0.0) * np.float64(x[j])
    return total
