# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""RMSNorm and LayerNorm of few vectors of size H."""

import math
from typing import NamedTuple

import numpy as np

from nemo_ee.decoding.cpu.kernels.compiled import compiled


class Norm(NamedTuple):
    """RMSNorm or LayerNorm over the last axis.

    Attributes:
        gain: [H]; [0] for no norm.
        bias: [H], or [0].
        eps: added to the variance.
        rms: RMSNorm rather than LayerNorm.
    """

    gain: np.ndarray
    bias: np.ndarray
    eps: float
    rms: bool

    @classmethod
    def none(cls, like: np.ndarray) -> "Norm":
        """None, of that dtype."""
        return cls(like[:0].copy(), like[:0].copy(), 0.0, True)


@compiled
def normalise_all(x, out, norm):
    """out = norm(x), [T, H]."""
    for t in range(len(x)):
        normalise(x[t], out[t], norm)


@compiled
def normalise(x, out, norm):
    """out = norm(x), [H]; may be the same array."""
    zero = x.dtype.type(0)
    size, mean, squares = x.dtype.type(len(x)), zero, zero
    if not norm.rms:
        for j in range(len(x)):
            mean += x[j]
        mean /= size
    for j in range(len(x)):
        squares += (x[j] - mean) * (x[j] - mean)
    factor = x.dtype.type(1 / math.sqrt(squares / size + norm.eps))
    for j in range(len(x)):
        out[j] = (x[j] - mean) * factor * norm.gain[j]
    if norm.bias.size:
        for j in range(len(x)):
            out[j] += norm.bias[j]
