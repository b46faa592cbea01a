# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""How the CPU kernels are compiled, and what they are built of."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from threading import local
from typing import Any

import numba
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from nemo_ee.runtime.upstream import numba_cache

FAST_MATHEMATICS = {"reassoc", "contract", "arcp", "nsz"}
"""Sums may be taken in any order, as vector units do. NaN and infinity stay what they are."""

LOOPS_ALONE = dict.fromkeys(
    ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion"), False
) | {"prange": True}
"""Only loops over `prange` run on threads: every other one that Numba finds takes seconds to compile."""

SOURCES = hashlib.sha256(
    b"".join(f.read_bytes() for f in sorted(Path(__file__).parent.glob("*.py")))
).hexdigest()
"""Of all kernels: each is compiled together with those that it calls."""


def compiled(function: Callable | None = None, *, parallel: bool = False) -> Any:
    """Compiles a function of NumPy arrays on its first call, once per machine where a cache can be written.

    Parallel functions are called from Python only: a compiled caller, read from the cache, would not start the
    threads that they need, and crash.
    """
    if function is None:
        return lambda inner: compiled(inner, parallel=parallel)
    options: dict[str, Any] = {"fastmath": FAST_MATHEMATICS, "nogil": True, "error_model": "numpy"}
    options |= (
        {"parallel": LOOPS_ALONE} if parallel else {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    )
    try:
        kernel = numba.njit(cache=True, **options)(function)
        numba_cache.stamp(kernel, SOURCES)
        return kernel
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(**options)(function)


@intrinsic
def widened(typingctx: Any, weight: Any, like: Any) -> Any:
    """A weight as a number of `like`'s type: float32, float64, int8, or the bits of a bfloat16 in uint16."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind, target = signature.args[0], context.get_value_type(signature.return_type)
        if kind == types.uint16:
            bits = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            wide = builder.bitcast(bits, ir.FloatType())
            return wide if target == wide.type else builder.fpext(wide, target)
        if isinstance(kind, types.Integer):
            return builder.sitofp(args[0], target)
        return context.cast(builder, args[0], kind, signature.return_type)

    return like(weight, like), codegen


@intrinsic
def _pointer(typingctx: Any, address: Any, like: Any) -> Any:
    pointer = types.CPointer(like.dtype)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(address, like), codegen


@compiled
def array_at(address, shape, like):
    """The array at an address, of `like`'s type of numbers; whoever gives addresses keeps the memory."""
    return numba.carray(_pointer(address, like), shape)


@cache
def is_zen() -> bool:
    """Whether this machine has a processor of AMD's Zen line."""
    return binding.get_host_cpu_name().startswith("znver")


def team(threads: int) -> tuple[int, bool]:
    """Lets kernels that this thread calls run on that many threads, or on as many as there may be.

    Returns:
        How many, and whether that is news: Numba may then have made its threads, and set OpenMP's number of them.
    """
    threads = min(threads, numba.config.NUMBA_NUM_THREADS)
    if getattr(_SET, "threads", None) == threads:  # asking Numba takes longer than some kernels
        return threads, False
    numba.set_num_threads(threads)
    _SET.threads = threads
    return threads, True


_SET = local()
"""What each thread has set."""
