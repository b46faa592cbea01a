# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A transformer layer on a few tokens, each of any sequence at any position, with a cache of keys and values.

One call per layer: torch's operations around the products are about 25 a layer, and each takes longer to start than
to run for few tokens.

Suffixes: T tokens, H hidden size, F features inside the MLP, N rows of the cache, L positions, G query groups,
R queries per group, D head size.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import prange

from nemo_ee.kernels.attention import attend, place_keys
from nemo_ee.kernels.compiled import compiled
from nemo_ee.kernels.exponential import exponential
from nemo_ee.kernels.norm import Norm, normalised
from nemo_ee.kernels.products import multiply

SILU, GELU, TANH_GELU, RELU = range(4)
"""Activations of an MLP."""


class Linear(NamedTuple):
    """See `multiply`."""

    weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray


class Layer(NamedTuple):
    """The weights of a layer and what is computed with them.

    Attributes:
        norm: before attention.
        qkv: [G x (R + 2) x D, H], of each group its queries, its key, its value.
        query_norm: over D.
        key_norm: over D.
        scale: of attention's scores.
        interleaved: pairs that rotate are neighbours, not halves.
        out: [H, G x R x D].
        mlp_norm: before the MLP.
        up: [F, H]; [2 F, H], gate before value, if `gated`.
        down: [H, F].
        gated: the activation of the gate multiplies the value.
        activation: see `SILU`.
    """

    norm: Norm
    qkv: Linear
    query_norm: Norm
    key_norm: Norm
    scale: float
    interleaved: bool
    out: Linear
    mlp_norm: Norm
    up: Linear
    down: Linear
    gated: bool
    activation: int


@compiled(parallel=True)
def run_layer(layer, x, result, cache, rows, positions, cos, sin, threads):
    """Writes the tokens' keys and values and the layer's output.

    Args:
        layer: a `Layer`.
        x: [T, H].
        result: [T, H].
        cache: [2, N, G, L, D] keys, values.
        rows: [T] of the cache.
        positions: [T].
        cos: [L, features that rotate], or [0, 0].
        sin: the same, signed (see `nemo_ee.megatron.decode.signed`).
        threads: that share the work.
    """
    tokens, kind = len(x), x.dtype
    groups, size = cache.shape[2], cache.shape[4]
    w, s, b = layer.qkv
    features = len(w)
    qkv = np.empty((tokens, features), kind)
    normed = normalised(x, layer.norm)
    for c in prange(threads):
        multiply(w, s, b, normed, qkv, c * features // threads, (c + 1) * features // threads)
    heads = qkv.reshape(tokens, groups, -1, size)
    place_keys(heads, cache, rows, positions, cos, sin, layer.interleaved, layer.query_norm, layer.key_norm)
    queries = heads.shape[2] - 2
    items, scale = tokens * groups * queries, layer.scale
    attended = np.empty((tokens, groups * queries * size), kind)
    for c in prange(threads):
        attend(
            heads, cache, rows, positions, scale, attended, c * items // threads, (c + 1) * items // threads
        )
    w1, s1, b1 = layer.out
    features = len(w1)
    middle = np.empty((tokens, features), kind)
    for c in prange(threads):
        first, last = c * features // threads, (c + 1) * features // threads
        multiply(w1, s1, b1, attended, middle, first, last)
        add(middle, x, first, last)
    w2, s2, b2 = layer.up
    gated, activation = layer.gated, layer.activation
    features = len(w2) // 2 if gated else len(w2)
    normed = normalised(middle, layer.mlp_norm)
    inside = np.empty((tokens, len(w2)), kind)
    active = np.empty((tokens, features), kind)
    for c in prange(threads):
        first, last = c * features // threads, (c + 1) * features // threads
        multiply(w2, s2, b2, normed, inside, first, last)
        if gated:
            multiply(w2, s2, b2, normed, inside, features + first, features + last)
        activate(inside, active, activation, gated, first, last)
    w3, s3, b3 = layer.down
    features = len(w3)
    for c in prange(threads):
        first, last = c * features // threads, (c + 1) * features // threads
        multiply(w3, s3, b3, active, result, first, last)
        add(result, middle, first, last)


@compiled
def add(out, x, first, last):
    """out[:, first:last] += x[:, first:last]."""
    for t in range(len(out)):
        for i in range(first, last):
            out[t, i] += x[t, i]


@compiled
def activate(inside, active, activation, gated, first, last):
    """active[:, first:last] = the activation of those features, times the gated ones."""
    features, kind = active.shape[1], inside.dtype.type
    for t in range(len(inside)):
        for i in range(first, last):
            v = inside[t, i]
            if activation == SILU:
                v = v / (kind(1) + exponential(-v))
            elif activation == GELU:
                v = kind(0.5) * v * (kind(1) + math.erf(v * kind(math.sqrt(0.5))))
            elif activation == TANH_GELU:
                u = kind(math.sqrt(2 / math.pi)) * (v + kind(0.044715) * v * v * v)
                v = kind(0.5) * v * (kind(1) + math.tanh(u))
            else:
                v = max(v, kind(0))
            active[t, i] = v * inside[t, features + i] if gated else v
