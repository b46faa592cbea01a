# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A transformer layer on a few tokens, each of any sequence at any position, with a cache of keys and values.

One call for any number of layers: torch's operations around the products are about 25 a layer, and each takes
longer to start than to run for few tokens. Handing the arrays of a layer over takes 20 microseconds too; hence a table
of their addresses.

Suffixes: T tokens, H hidden size, F features inside the MLP, N rows of the cache, L positions, G query groups,
R queries per group, D head size.
"""

from typing import NamedTuple

import numpy as np
from numba import prange

from nemo_ee.decoding.cpu.kernels.attention import attend, place_keys
from nemo_ee.decoding.cpu.kernels.compiled import array_at, compiled
from nemo_ee.decoding.cpu.kernels.mlp import add, copy, fill_inside
from nemo_ee.decoding.cpu.kernels.norm import Norm, normalise_all
from nemo_ee.decoding.cpu.kernels.products import Linear, multiply


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
        activation: see `nemo_ee.decoding.cpu.kernels.mlp.SILU`.
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


class Shape(NamedTuple):
    """What layers that run in one call have in common.

    Attributes:
        sizes: H, F of the MLP's second matrix, N, G, R, L, D.
        scales: whether rows of matrices have factors.
        biases: whether these have biases: the four linears in the layer's order, then the four norms.
        gains: whether there are these norms.
        eps: of the norms.
        rms: which norms are RMSNorm.
        scale: see `Layer`.
        interleaved: see `Layer`.
        gated: see `Layer`.
        activation: see `Layer`.
    """

    sizes: tuple[int, ...]
    scales: bool
    biases: tuple[bool, ...]
    gains: tuple[bool, ...]
    eps: tuple[float, ...]
    rms: tuple[bool, ...]
    scale: float
    interleaved: bool
    gated: bool
    activation: int


def shape_of(layer: Layer, cache: np.ndarray) -> Shape:
    """Of a layer with its cache [2, N, G, L, D]."""
    _, rows, groups, length, size = cache.shape
    hidden, queries = layer.out.weight.shape[0], layer.out.weight.shape[1] // (groups * size)
    linears, norms = _parts(layer)
    return Shape(
        sizes=(hidden, layer.down.weight.shape[1], rows, groups, queries, length, size),
        scales=bool(layer.qkv.scale.size),
        biases=tuple(bool(part.bias.size) for part in (*linears, *norms)),
        gains=tuple(bool(norm.gain.size) for norm in norms),
        eps=tuple(norm.eps for norm in norms),
        rms=tuple(norm.rms for norm in norms),
        scale=layer.scale,
        interleaved=layer.interleaved,
        gated=layer.gated,
        activation=layer.activation,
    )


def addresses(layer: Layer, cache: np.ndarray) -> list[int]:
    """Where `run_layers` finds a layer's arrays and its cache."""
    linears, norms = _parts(layer)
    arrays = [array for part in linears for array in part]
    arrays += [array for norm in norms for array in (norm.gain, norm.bias)]
    return [array.ctypes.data for array in (*arrays, cache)]


def kept_at(hidden: np.ndarray | None) -> int:
    """Where `run_layers` keeps the states behind a layer, [N, L, H]; 0 for nowhere."""
    return 0 if hidden is None else hidden.ctypes.data


def _parts(layer: Layer) -> tuple[list[Linear], list[Norm]]:
    linears = [layer.qkv, layer.out, layer.up, layer.down]
    return linears, [layer.norm, layer.query_norm, layer.key_norm, layer.mlp_norm]


@compiled
def _linear(table, n, rows, columns, shape, weights, numbers):
    """The linear with that number in the layer's order."""
    return Linear(
        array_at(table[3 * n], (rows, columns), weights),
        array_at(table[3 * n + 1], rows if shape.scales else 0, numbers),
        array_at(table[3 * n + 2], rows if shape.biases[n] else 0, numbers),
    )


@compiled
def _norm(table, n, size, shape, numbers):
    """The norm with that number in the layer's order."""
    return Norm(
        array_at(table[12 + 2 * n], size if shape.gains[n] else 0, numbers),
        array_at(table[13 + 2 * n], size if shape.biases[4 + n] else 0, numbers),
        shape.eps[n],
        shape.rms[n],
    )


@compiled(parallel=True)
def run_layers(table, shape, weights, x, result, rows, positions, rotates, cos, sin, threads):
    """Runs tokens through layers, one after the other; writes their keys and values and the output.

    Args:
        table: [layers, 22], see `addresses` and `kept_at`.
        shape: of all layers.
        weights: an example of the numbers in matrices.
        x: [T, H].
        result: [T, H].
        rows: [T] of the cache.
        positions: [T].
        rotates: [layers] whether queries and keys have rotary position embeddings.
        cos: [L, features that rotate].
        sin: the same, signed (see `nemo_ee.decoding.layers.packed_tokens.signed`).
        threads: that share the work.
    """
    tokens, kind = len(x), x.dtype
    hidden, inner, cached, groups, queries, length, size = shape.sizes
    gated, activation, scale = shape.gated, shape.activation, shape.scale
    features, wide, outer = groups * (queries + 2) * size, groups * queries * size, inner * (1 + gated)
    items = tokens * groups * queries
    qkv, attended = np.empty((tokens, features), kind), np.empty((tokens, wide), kind)
    middle, normed = np.empty((tokens, hidden), kind), np.empty((tokens, hidden), kind)
    inside, active = np.empty((tokens, outer), kind), np.empty((tokens, inner), kind)
    heads = qkv.reshape(tokens, groups, queries + 2, size)
    copy(x, result)
    for n in range(len(table)):
        at = table[n]
        cache = array_at(at[20], (2, cached, groups, length, size), x)
        normalise_all(result, normed, _norm(at, 0, hidden, shape, x))
        w, s, b = _linear(at, 0, features, hidden, shape, weights, x)
        for c in prange(threads):
            multiply(w, s, b, normed, qkv, c * features // threads, (c + 1) * features // threads)
        head_norms = _norm(at, 1, size, shape, x), _norm(at, 2, size, shape, x)
        place_keys(heads, cache, rows, positions, cos, sin, rotates[n], shape.interleaved, *head_norms)
        for c in prange(threads):
            first, last = c * items // threads, (c + 1) * items // threads
            attend(heads, cache, rows, positions, scale, attended, first, last)
        w1, s1, b1 = _linear(at, 1, hidden, wide, shape, weights, x)
        for c in prange(threads):
            first, last = c * hidden // threads, (c + 1) * hidden // threads
            multiply(w1, s1, b1, attended, middle, first, last)
            add(middle, result, first, last)
        normalise_all(middle, normed, _norm(at, 3, hidden, shape, x))
        w2, s2, b2 = _linear(at, 2, outer, hidden, shape, weights, x)
        for c in prange(threads):
            first, last = c * inner // threads, (c + 1) * inner // threads
            fill_inside((w2, s2, b2), normed, inside, active, activation, gated, first, last)
        w3, s3, b3 = _linear(at, 3, hidden, inner, shape, weights, x)
        for c in prange(threads):
            first, last = c * hidden // threads, (c + 1) * hidden // threads
            multiply(w3, s3, b3, active, result, first, last)
            add(result, middle, first, last)
        if at[21]:
            kept = array_at(at[21], (cached, length, hidden), x)
            for t in range(tokens):
                for j in range(hidden):
                    kept[rows[t], positions[t], j] = result[t, j]
