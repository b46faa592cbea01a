# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Logits of few tokens and what decoding asks about them, in one pass over the weights.

Suffixes: N tokens, R rows of the output layer, H hidden size.
"""

import math

import numpy as np
from numba import prange

from nemo_ee.kernels.compiled import compiled
from nemo_ee.kernels.exponential import exponential
from nemo_ee.kernels.products import multiply


@compiled(parallel=True)
def read_out(weight, scale, emittable, bucket, x, logits, best, row, log_sum, threads):
    """Fills in logits and their summary.

    Args:
        weight: [R, H], see `nemo_ee.kernels.products.multiply`.
        scale: [R], or [0].
        emittable: rows that stand for a token; the logits of the others become -inf.
        bucket: [H + 1] weight and bias of one more logit, which counts in the sum alone; or [0].
        x: [N, H].
        logits: [N, R], or [N, R + 1] with a bucket.
        best: [N] the highest logit of an emittable row.
        row: [N] that row, the lowest of equal ones.
        log_sum: [N] log of the sum of exp over all logits.
        threads: that share the work.
    """
    tokens, rows, kind = len(x), len(weight), x.dtype.type
    none = np.empty(0, x.dtype)
    tops = np.empty((threads, tokens), x.dtype)
    where = np.zeros((threads, tokens), np.int64)
    sums = np.zeros((threads, tokens), x.dtype)
    for c in prange(threads):
        first, last = c * rows // threads, (c + 1) * rows // threads
        multiply(weight, scale, none, x, logits, first, last)
        for t in range(tokens):
            tops[c, t], where[c, t] = _highest(logits[t], first, min(last, emittable))
            sums[c, t] = _sum(logits[t], first, min(last, emittable), tops[c, t])
            for i in range(max(first, emittable), last):
                logits[t, i] = -np.inf
    for t in range(tokens):
        best[t], row[t] = tops[0, t], where[0, t]
        for c in range(1, threads):
            if tops[c, t] > best[t] or tops[c, t] != tops[c, t]:
                best[t], row[t] = tops[c, t], where[c, t]
        top = best[t]
        if bucket.size:
            s = bucket[len(bucket) - 1]
            for j in range(x.shape[1]):
                s += bucket[j] * x[t, j]
            logits[t, rows] = s
            top = max(top, s)
        total = kind(0)
        for c in range(threads):
            if tops[c, t] > -np.inf or tops[c, t] != tops[c, t]:
                total += sums[c, t] * kind(math.exp(tops[c, t] - top))
        if bucket.size:
            total += kind(math.exp(logits[t, rows] - top))
        log_sum[t] = top + kind(math.log(total)) if total > 0 or total != total else kind(-np.inf)


@compiled
def _highest(logits, first, last):
    """The highest of some logits, and where it is; NaN if one is."""
    top, at = logits.dtype.type(-np.inf), 0
    for i in range(first, last):
        if logits[i] > top or logits[i] != logits[i]:
            top, at = logits[i], i
    return top, at


@compiled
def _sum(logits, first, last, top):
    """Of exp(logit - top)."""
    total = logits.dtype.type(0)
    for i in range(first, last):
        total += exponential(logits[i] - top)
    return total
