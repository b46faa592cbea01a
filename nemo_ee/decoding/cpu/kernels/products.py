# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Products of a weight matrix with few vectors, as fast as memory delivers the weights.

A core's prefetcher follows one stream of addresses per page of memory. A product that goes through a matrix
row after row is one stream and leaves a third of the bandwidth unused; so eight rows that are far apart are
read at once (measured on two cores of x86: 17 to 20 GB/s with one stream, 24 to 28 with eight).

Suffixes: T tokens, I input features, O output features.
"""

from typing import NamedTuple

import numpy as np
from numba import prange

from nemo_ee.decoding.cpu.kernels.compiled import compiled, widened


class Linear(NamedTuple):
    """See `multiply`; with a weight [0, 0] there is none."""

    weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray

    @classmethod
    def none(cls, like: "Linear") -> "Linear":
        """Of that type."""
        return cls(like.weight[:0, :0].copy(), like.scale[:0].copy(), like.bias[:0].copy())


@compiled
def multiply(weight, scale, bias, x, out, first, last):
    """out[:, first:last] = (x weight^T * scale + bias)[:, first:last].

    Args:
        weight: [O, I], see `widened`.
        scale: [O] factors of the rows, or [0].
        bias: [O], or [0].
        x: [T, I].
        out: [T, O].
        first: row of the weight to begin with.
        last: row to end before.
    """
    tokens = len(x)
    if tokens == 1:
        done = _one_token(weight, x, out, first, last)
    elif tokens == 2:
        done = _two_tokens(weight, x, out, first, last)
    else:
        done = _many_tokens(weight, x, out, first, last)
    for t in range(tokens):
        for i in range(done, last):
            out[t, i] = _dot(weight[i], x[t])
        if scale.size:
            for i in range(first, last):
                out[t, i] *= scale[i]
        if bias.size:
            for i in range(first, last):
                out[t, i] += bias[i]


@compiled
def _dot(row, x):
    s = zero = x.dtype.type(0)
    for j in range(len(x)):
        s += widened(row[j], zero) * x[j]
    return s


@compiled
def _one_token(weight, x, out, first, last):
    """Eight streams of rows; returns the first row that is left."""
    m = (last - first) // 8
    a, y, zero = x[0], out[0], x.dtype.type(0)
    for i in range(first, first + m):
        w0, w1, w2, w3 = weight[i], weight[i + m], weight[i + 2 * m], weight[i + 3 * m]
        w4, w5, w6, w7 = weight[i + 4 * m], weight[i + 5 * m], weight[i + 6 * m], weight[i + 7 * m]
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = zero
        for j in range(len(a)):
            v = a[j]
            s0 += widened(w0[j], zero) * v
            s1 += widened(w1[j], zero) * v
            s2 += widened(w2[j], zero) * v
            s3 += widened(w3[j], zero) * v
            s4 += widened(w4[j], zero) * v
            s5 += widened(w5[j], zero) * v
            s6 += widened(w6[j], zero) * v
            s7 += widened(w7[j], zero) * v
        y[i], y[i + m], y[i + 2 * m], y[i + 3 * m] = s0, s1, s2, s3
        y[i + 4 * m], y[i + 5 * m], y[i + 6 * m], y[i + 7 * m] = s4, s5, s6, s7
    return first + 8 * m


@compiled
def _two_tokens(weight, x, out, first, last):
    """Eight streams of rows; returns the first row that is left."""
    m = (last - first) // 8
    a, b, zero = x[0], x[1], x.dtype.type(0)
    for i in range(first, first + m):
        w0, w1, w2, w3 = weight[i], weight[i + m], weight[i + 2 * m], weight[i + 3 * m]
        w4, w5, w6, w7 = weight[i + 4 * m], weight[i + 5 * m], weight[i + 6 * m], weight[i + 7 * m]
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = zero
        r0 = r1 = r2 = r3 = r4 = r5 = r6 = r7 = zero
        for j in range(len(a)):
            u, v = a[j], b[j]
            w = widened(w0[j], zero)
            s0 += w * u
            r0 += w * v
            w = widened(w1[j], zero)
            s1 += w * u
            r1 += w * v
            w = widened(w2[j], zero)
            s2 += w * u
            r2 += w * v
            w = widened(w3[j], zero)
            s3 += w * u
            r3 += w * v
            w = widened(w4[j], zero)
            s4 += w * u
            r4 += w * v
            w = widened(w5[j], zero)
            s5 += w * u
            r5 += w * v
            w = widened(w6[j], zero)
            s6 += w * u
            r6 += w * v
            w = widened(w7[j], zero)
            s7 += w * u
            r7 += w * v
        y = out[0]
        y[i], y[i + m], y[i + 2 * m], y[i + 3 * m] = s0, s1, s2, s3
        y[i + 4 * m], y[i + 5 * m], y[i + 6 * m], y[i + 7 * m] = s4, s5, s6, s7
        y = out[1]
        y[i], y[i + m], y[i + 2 * m], y[i + 3 * m] = r0, r1, r2, r3
        y[i + 4 * m], y[i + 5 * m], y[i + 6 * m], y[i + 7 * m] = r4, r5, r6, r7
    return first + 8 * m


@compiled
def _many_tokens(weight, x, out, first, last):
    """Four streams of rows, four tokens at a time; returns the first row that is left."""
    m, end = (last - first) // 4, len(x) - 1
    zero = x.dtype.type(0)
    for i in range(first, first + m):
        w0, w1, w2, w3 = weight[i], weight[i + m], weight[i + 2 * m], weight[i + 3 * m]
        for t in range(0, end + 1, 4):
            t1, t2, t3 = min(t + 1, end), min(t + 2, end), min(t + 3, end)
            a, b, c, d = x[t], x[t1], x[t2], x[t3]
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = zero
            c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = zero
            for j in range(len(a)):
                p, q, r, s = a[j], b[j], c[j], d[j]
                w = widened(w0[j], zero)
                a0 += w * p
                b0 += w * q
                c0 += w * r
                d0 += w * s
                w = widened(w1[j], zero)
                a1 += w * p
                b1 += w * q
                c1 += w * r
                d1 += w * s
                w = widened(w2[j], zero)
                a2 += w * p
                b2 += w * q
                c2 += w * r
                d2 += w * s
                w = widened(w3[j], zero)
                a3 += w * p
                b3 += w * q
                c3 += w * r
                d3 += w * s
            y = out[t]
            y[i], y[i + m], y[i + 2 * m], y[i + 3 * m] = a0, a1, a2, a3
            y = out[t1]
            y[i], y[i + m], y[i + 2 * m], y[i + 3 * m] = b0, b1, b2, b3
            y = out[t2]
            y[i], y[i + m], y[i + 2 * m], y[i + 3 * m] = c0, c1, c2, c3
            y = out[t3]
            y[i], y[i + m], y[i + 2 * m], y[i + 3 * m] = d0, d1, d2, d3
    return first + 4 * m


@compiled(parallel=True)
def product(weight, scale, bias, x, out, threads):
    """out = x weight^T * scale + bias, see `multiply`; rows are shared out among the threads."""
    rows = len(weight)
    for c in prange(threads):
        multiply(weight, scale, bias, x, out, c * rows // threads, (c + 1) * rows // threads)
