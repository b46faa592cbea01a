# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The first half of an MLP and what stands behind products, for some of the features of few tokens."""

import math

from nemo_ee.decoding.cpu.kernels.compiled import compiled
from nemo_ee.decoding.cpu.kernels.exponential import exponential
from nemo_ee.decoding.cpu.kernels.products import multiply

SILU, GELU, TANH_GELU, RELU = range(4)
"""Activations of an MLP."""


@compiled
def copy(x, out):
    """out = x, [T, H]; NumPy's own takes ten seconds to compile, with all its errors."""
    for t in range(len(x)):
        for i in range(x.shape[1]):
            out[t, i] = x[t, i]


@compiled
def add(out, x, first, last):
    """out[:, first:last] += x[:, first:last]."""
    for t in range(len(out)):
        for i in range(first, last):
            out[t, i] += x[t, i]


@compiled
def fill_inside(up, x, inside, active, activation, gated, first, last):
    """active[:, first:last]: what an MLP's second matrix reads of x [T, H].

    Args:
        up: weight [F, H], scale and bias, see `multiply`; of 2 F rows, gate before value, if `gated`.
        x: [T, H].
        inside: [T, rows of the weight], to be filled on the way.
        active: [T, F].
        activation: see `SILU`.
        gated: the activation of the gate multiplies the value.
        first: feature to begin with.
        last: feature to end before.
    """
    weight, scale, bias = up
    features = active.shape[1]
    multiply(weight, scale, bias, x, inside, first, last)
    if gated:
        multiply(weight, scale, bias, x, inside, features + first, features + last)
    activate(inside, active, activation, gated, first, last)


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
