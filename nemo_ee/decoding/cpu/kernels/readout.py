# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A head on few tokens: the logits after each and what decoding asks about them, in one call.

Suffixes: N tokens, H hidden size, F features inside the MLP, R rows of the projection.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import prange

from nemo_ee.decoding.cpu.kernels.compiled import compiled
from nemo_ee.decoding.cpu.kernels.exponential import exponential
from nemo_ee.decoding.cpu.kernels.mlp import SILU, add, copy, fill_inside
from nemo_ee.decoding.cpu.kernels.norm import Norm, normalise_all
from nemo_ee.decoding.cpu.kernels.products import Linear, multiply


class Head(NamedTuple):
    """projection(linear(norm(x)) + MLP(mlp_norm(x))); without a linear projection(norm(x + MLP(mlp_norm(x)))).

    Attributes:
        projection: [R, H].
        bucket: [H + 1] weight and bias of one more logit, which counts in the softmax alone; or [0].
        names: the tokens that the first rows stand for; or [0], row i is token i.
        norm: see `Norm`.
        linear: [H, H]; see `Linear` for none.
        mlp_norm: see `Norm`.
        up: [F, H]; [2 F, H], gate before value, if `gated`; or none.
        down: [H, F]; or none.
        gated: the activation of the gate multiplies the value.
        activation: see `nemo_ee.decoding.cpu.kernels.mlp.SILU`.
    """

    projection: Linear
    bucket: np.ndarray
    names: np.ndarray
    norm: Norm
    linear: Linear
    mlp_norm: Norm
    up: Linear
    down: Linear
    gated: bool
    activation: int

    @classmethod
    def plain(cls, projection: Linear, bucket: np.ndarray, names: np.ndarray) -> "Head":
        """projection(x)."""
        linear, norm = Linear.none(projection), Norm.none(bucket)
        return cls(projection, bucket, names, norm, linear, norm, linear, linear, False, SILU)


@compiled(parallel=True)
def read_out(head, emittable, x, logits, best, row, log_sum, token, sure, threads):
    """Fills in logits and their summary.

    Args:
        head: a `Head`.
        emittable: rows that stand for a token; the logits of the others become -inf.
        x: [N, H].
        logits: [N, R], or [N, R + 1] with a bucket.
        best: [N] the highest logit of an emittable row.
        row: [N] that row, the lowest of equal ones.
        log_sum: [N] log of the sum of exp over all logits.
        token: [N] what that row stands for.
        sure: [N] its probability.
        threads: that share the work.
    """
    tokens, hidden, kind = len(x), x.shape[1], x.dtype.type
    none = np.empty(0, x.dtype)
    w0, s0, b0 = head.linear
    w1, s1, b1 = head.up
    w2, s2, b2 = head.down
    gated, activation, inner = head.gated, head.activation, w2.shape[1]
    state = np.empty((tokens, hidden), x.dtype)
    if head.norm.gain.size and (len(w0) or not inner):
        normalise_all(x, state, head.norm)
    else:
        copy(x, state)
    if len(w0) or inner:
        source, mapped = state, np.empty((tokens, len(w0)), x.dtype)
        normed, branch = np.empty((tokens, hidden), x.dtype), np.empty((tokens, hidden), x.dtype)
        inside, active = np.empty((tokens, len(w1)), x.dtype), np.empty((tokens, inner), x.dtype)
        if inner:
            normalise_all(x, normed, head.mlp_norm)
        for c in prange(threads):
            if inner:
                first, last = c * inner // threads, (c + 1) * inner // threads
                fill_inside((w1, s1, b1), normed, inside, active, activation, gated, first, last)
            if len(w0):
                multiply(w0, s0, b0, source, mapped, c * hidden // threads, (c + 1) * hidden // threads)
        if len(w0):
            state = mapped
        if inner:
            for c in prange(threads):
                first, last = c * hidden // threads, (c + 1) * hidden // threads
                multiply(w2, s2, b2, active, branch, first, last)
                add(state, branch, first, last)
            if head.norm.gain.size and not len(w0):
                normalise_all(state, state, head.norm)
    weight, scale, _ = head.projection
    rows = len(weight)
    tops = np.empty((threads, tokens), x.dtype)
    where = np.empty((threads, tokens), np.int64)
    sums = np.empty((threads, tokens), x.dtype)
    for c in prange(threads):
        first, last = c * rows // threads, (c + 1) * rows // threads
        multiply(weight, scale, none, state, logits, first, last)
        for t in range(tokens):
            tops[c, t], where[c, t] = _highest(logits[t], first, min(last, emittable))
            sums[c, t] = sum_of_exponentials(logits[t], first, min(last, emittable), tops[c, t])
            for i in range(max(first, emittable), last):
                logits[t, i] = -np.inf
    bucket = head.bucket
    for t in range(tokens):
        best[t], row[t] = tops[0, t], where[0, t]
        for c in range(1, threads):
            if tops[c, t] > best[t] or tops[c, t] != tops[c, t]:
                best[t], row[t] = tops[c, t], where[c, t]
        top = best[t]
        if bucket.size:
            s = bucket[hidden]
            for j in range(hidden):
                s += bucket[j] * state[t, j]
            logits[t, rows] = s
            top = max(top, s)
        total = kind(0)
        for c in range(threads):
            if tops[c, t] > -np.inf or tops[c, t] != tops[c, t]:
                total += sums[c, t] * kind(math.exp(tops[c, t] - top))
        if bucket.size:
            total += kind(math.exp(logits[t, rows] - top))
        log_sum[t] = top + kind(math.log(total)) if total > 0 or total != total else kind(-np.inf)
        token[t] = head.names[row[t]] if head.names.size else row[t]
        sure[t] = kind(math.exp(best[t] - log_sum[t]))


@compiled
def _highest(logits, first, last):
    """The highest of some logits, and where it is; NaN if one is."""
    top, at = logits.dtype.type(-np.inf), 0
    for i in range(first, last):
        if logits[i] > top or logits[i] != logits[i]:
            top, at = logits[i], i
    return top, at


@compiled
def sum_of_exponentials(logits, first, last, top):
    """Of exp(logit - top)."""
    total = logits.dtype.type(0)
    for i in range(first, last):
        total += exponential(logits[i] - top)
    return total
