# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The exponential function of float32 such that loops over it use vector units, which the C library's keeps from it.

After Cephes (S. L. Moshier, netlib.org/cephes): e^x = 2^n e^r with |r| <= ln(2) / 2, e^r by a polynomial; the
relative error is below 3e-7. Arguments below -87 and above 88 count as these.
"""

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4


@intrinsic
def _nearest(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = args[0].type
        function = builder.module.declare_intrinsic("llvm.nearbyint", [kind])
        return builder.call(function, args)

    return x(x), codegen


@intrinsic
def _two_to(typingctx: Any, n: Any) -> Any:
    """2^n as float32, of a whole float32 from -126 to 127."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        whole = ir.IntType(32)
        biased = builder.add(builder.fptosi(args[0], whole), ir.Constant(whole, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(whole, 23)), ir.FloatType())

    return n(n), codegen


def exponential(x):
    """e^x, in kernels only."""
    raise NotImplementedError


@overload(exponential)
def _exponential(x):
    if x != types.float32:
        return lambda x: math.exp(x)
    f = types.float32

    def in_float32(x):
        x = f(-87) if x < f(-87) else x
        x = f(88) if x > f(88) else x
        n = _nearest(x * f(_LOG2_E))
        r = x - n * f(_LN2_HIGH) - n * f(_LN2_LOW)
        p = f(1.9875691500e-4)
        p = p * r + f(1.3981999507e-3)
        p = p * r + f(8.3334519073e-3)
        p = p * r + f(4.1665795894e-2)
        p = p * r + f(1.6666665459e-1)
        p = p * r + f(5.0000001201e-1)
        return (p * r * r + r + f(1)) * _two_to(n)

    return in_float32
