# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Activations by their mathematics, whatever kernel computes them elsewhere."""

from torch import Tensor
from torch.nn.functional import gelu


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU by tanh, as megatron-core's fused kernels compute it: [...] -> [...]."""
    return gelu(x, approximate="tanh")
