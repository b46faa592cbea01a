# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Attention of a few tokens over cached keys and values, head by head.

Suffixes as in `nemo_ee.decoding.cpu.kernels.layer`.
"""

import numpy as np

from nemo_ee.decoding.cpu.kernels.compiled import compiled
from nemo_ee.decoding.cpu.kernels.exponential import exponential
from nemo_ee.decoding.cpu.kernels.norm import normalise


@compiled
def place_keys(heads, cache, rows, positions, cos, sin, rotates, interleaved, query_norm, key_norm):
    """Norms and rotates queries and keys in place, and writes keys and values into the cache.

    Args:
        heads: [T, G, R + 2, D], of each group its queries, its key, its value.
    """
    queries = heads.shape[2] - 2
    for t in range(len(heads)):
        row, position = rows[t], positions[t]
        for g in range(heads.shape[1]):
            for h in range(queries + 1):
                head = heads[t, g, h]
                if h < queries and query_norm.gain.size:
                    normalise(head, head, query_norm)
                if h == queries and key_norm.gain.size:
                    normalise(head, head, key_norm)
                if rotates:
                    rotate(head, cos[position], sin[position], interleaved)
            for d in range(heads.shape[3]):
                cache[0, row, g, position, d] = heads[t, g, queries, d]
                cache[1, row, g, position, d] = heads[t, g, queries + 1, d]


@compiled
def rotate(head, cos, sin, interleaved):
    """Rotary position embedding of a head's first features, in place."""
    half = len(cos) // 2
    for i in range(half):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        a, b = head[first], head[second]
        head[first] = a * cos[first] + b * sin[first]
        head[second] = b * cos[second] + a * sin[second]


@compiled
def attend(heads, cache, rows, positions, scale, out, first, last):
    """Attention of the queries with numbers `first` to `last` - 1, in the order token, group, query.

    Args:
        heads: [T, G, R + 2, D], of which the queries are read.
        out: [T, G x R x D].
    """
    groups, queries, size = heads.shape[1], heads.shape[2] - 2, heads.shape[3]
    kind = heads.dtype.type
    weights = np.empty(cache.shape[3], heads.dtype)
    for item in range(first, last):
        t, g = item // (groups * queries), item // queries % groups
        h, length = item % queries, positions[t] + 1
        query = heads[t, g, h]
        keys, values = cache[0, rows[t], g], cache[1, rows[t], g]
        total = _softmax(query, keys, kind(scale), weights[:length])
        start = (g * queries + h) * size
        _mean(weights[:length], values, kind(1) / total, out[t, start : start + size])


@compiled
def _softmax(query, keys, scale, weights):
    """Fills in e^(score - the highest) of each key; returns their sum."""
    zero = query.dtype.type(0)
    even = len(weights) - len(weights) % 4
    highest = query.dtype.type(-np.inf)
    for j in range(0, even, 4):
        k0, k1, k2, k3 = keys[j], keys[j + 1], keys[j + 2], keys[j + 3]
        s0 = s1 = s2 = s3 = zero
        for d in range(len(query)):
            q = query[d]
            s0 += q * k0[d]
            s1 += q * k1[d]
            s2 += q * k2[d]
            s3 += q * k3[d]
        weights[j], weights[j + 1], weights[j + 2], weights[j + 3] = s0, s1, s2, s3
    for j in range(even, len(weights)):
        key, s = keys[j], zero
        for d in range(len(query)):
            s += query[d] * key[d]
        weights[j] = s
    for j in range(len(weights)):
        weights[j] *= scale
        highest = max(highest, weights[j])
    total = zero
    for j in range(len(weights)):
        weights[j] = exponential(weights[j] - highest)
        total += weights[j]
    return total


@compiled
def _mean(weights, values, factor, out):
    """out = factor * the sum of the values, each times its weight."""
    for d in range(len(out)):
        out[d] = 0
    even = len(weights) - len(weights) % 8
    for j in range(0, even, 8):
        v0, v1, v2, v3 = values[j], values[j + 1], values[j + 2], values[j + 3]
        v4, v5, v6, v7 = values[j + 4], values[j + 5], values[j + 6], values[j + 7]
        w0, w1, w2, w3 = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
        w4, w5, w6, w7 = weights[j + 4], weights[j + 5], weights[j + 6], weights[j + 7]
        for d in range(len(out)):
            low = (w0 * v0[d] + w1 * v1[d]) + (w2 * v2[d] + w3 * v3[d])
            out[d] += low + (w4 * v4[d] + w5 * v5[d]) + (w6 * v6[d] + w7 * v7[d])
    for j in range(even, len(weights)):
        value, w = values[j], weights[j]
        for d in range(len(out)):
            out[d] += w * value[d]
    for d in range(len(out)):
        out[d] *= factor
