# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What torch.compile would do, where it cannot: megatron-core's small functions run as they are written.

On a GPU torch.compile writes kernels for Triton, which builds its launchers with a C compiler against Python's
headers (triton/runtime/build.py), found at the first call. A machine with nothing but pip may have neither.
"""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

from nemo_ee.runtime.patching import MEGATRON, Patch


def can_compile() -> bool:
    """Whether there is all that torch.compile needs for a GPU: Triton, a C compiler, Python's headers."""
    if importlib.util.find_spec("triton") is None:
        return False
    compilers = os.environ.get("CC", "").split()[:1] or ["gcc", "clang"]
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return any(map(shutil.which, compilers)) and headers.exists()


PATCHES: tuple[Patch, ...] = (
    Patch(
        "megatron.core.jit",
        "jit_fuser",
        MEGATRON,
        "is torch.compile, which needs a compiler, and on a CPU takes longer than it saves",
        lambda original: lambda function: function,
    ),
)
"""The one decorator by which megatron-core asks for compilation."""
