# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The most memory of tensors that work takes at any time."""

from collections.abc import Callable
from typing import Any

import torch

MIB = 2**20


def memory_peak(work: Callable[[], Any]) -> tuple[float, Any]:
    """Runs it; MiB that torch's allocator gave out at most beyond those from before, and what the work returned.

    Of a CPU they are found in the allocator's events in a profile: what was there before has none.
    """
    from torch.profiler import ProfilerActivity, profile

    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = work()
        return (torch.cuda.max_memory_allocated() - before) / MIB, found
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        found = work()
    events, highest, now = recorded.profiler.kineto_results.events(), 0, 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += change
        highest = max(highest, now)
    return highest / MIB, found
