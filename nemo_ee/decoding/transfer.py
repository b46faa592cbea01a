# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Small numbers between the host and a device, with as few waits for the device as can be."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_host(*tensors: Tensor) -> list[list[Any]]:
    """What several tensors [n] on one device hold: one wait for it, however many they are.

    On a GPU they travel together in float64, which is exact for floating-point numbers and for integers below 2^53,
    token ids above all.
    """
    if tensors[0].device.type == "cpu":
        return [tensor.tolist() for tensor in tensors]
    values = torch.cat([tensor.double() for tensor in tensors]).tolist()
    out, first = [], 0
    for tensor in tensors:
        part = values[first : first + len(tensor)]
        out.append(part if tensor.is_floating_point() else list(map(int, part)))
        first += len(tensor)
    return out


def to_device(values: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of (nested lists of) numbers. `torch.tensor(…, device=…)` would wait until a GPU has done all that
    it was told before; this does not."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)
