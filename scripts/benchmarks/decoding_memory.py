# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The most memory that a call takes beyond what was there before it."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROCESS = Path("/proc/self")


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """Runs the call and returns by how much the memory in use rose at most meanwhile.

    On a GPU that is what torch's allocator gave out; on a CPU the process's resident memory, after what is
    free of it went back to the system. None where the system does not tell (it is Linux that does).
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    if not (PROCESS / "clear_refs").exists():
        call()
        return None
    ctypes.CDLL(None).malloc_trim(0)
    (PROCESS / "clear_refs").write_text("5")  # VmHWM begins anew
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = (PROCESS / "status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith(key + ":"))
    return 1024 * int(kib)
