# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""When Numba compiles anew what it has cached. Imports nothing: kernels import it."""

from typing import Any


def stamp(kernel: Any, sources: str) -> None:
    """Lets a kernel's cache hold as long as its sources are the same.

    Numba's own stamp (0.62 to 0.68, `IndexDataCacheFile`) is of the function's file alone, and a kernel is compiled
    together with those that it calls.

    Args:
        kernel: a Numba dispatcher with a cache.
        sources: a digest of all that it is compiled of.
    """
    kernel._cache._cache_file._source_stamp = sources
