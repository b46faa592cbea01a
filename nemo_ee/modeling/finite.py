# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Whether weights are numbers: NaN and infinities in them make every output NaN, without a word."""

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that hold NaN or an infinity.

    Reads each tensor once, at the speed of memory, and waits for the device once: a sum is finite only if all of its
    terms are. Where one is not, which large numbers can lead to, too, all elements are looked at.

    Args:
        tensors: by name, of any dtype and device; integers are always finite.
    """
    floats = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    sums: dict[torch.device, list[tuple[str, Tensor, Tensor]]] = {}
    for name, tensor in floats:
        sums.setdefault(tensor.device, []).append((name, tensor, _sum(tensor)))
    suspect = []
    for found in sums.values():
        fine = torch.stack([total.double() for _, _, total in found]).isfinite().tolist()
        suspect += [(name, tensor) for (name, tensor, _), good in zip(found, fine, strict=True) if not good]
    return [name for name, tensor in suspect if not _widened(tensor).isfinite().all()]


def _sum(tensor: Tensor) -> Tensor:
    """In the tensor's own dtype: torch adds up half precision in float32 all the same, at ten times the speed."""
    return _widened(tensor).sum()


def _widened(tensor: Tensor) -> Tensor:
    """8-bit floats as float32: torch computes nothing else with them."""
    return tensor.float() if tensor.element_size() == 1 else tensor
