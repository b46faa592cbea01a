# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The weights of linear layers and norms as plain functions, for decoding: no modules, no autograd Functions.

Suffixes: T tokens, I input features, O output features of this tensor-parallel rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, rms_norm

from nemo_ee.megatron.norms import TorchNorm
from nemo_ee.megatron.vocab_parallel import reduce_over_ranks

WEIGHT_KINDS = ("native", "int8")
"""How decoding holds weights: as they are, or as 8-bit integers with a scale per output feature."""


class DenseLinear:
    """x W^T + b.

    Args:
        weight: [O, I]; not copied if it has the dtype.
        bias: [O] or None.
        dtype: to compute in.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.transposed = self.weight.t()

    def __call__(self, x: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        return linear(x, self.weight, self.bias)

    def onto(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x W^T + b, [T, O]: in one operation where dtypes agree."""
        if residual.dtype != x.dtype:
            return residual + linear(x, self.weight, self.bias)
        out = torch.addmm(residual, x, self.transposed)
        return out if self.bias is None else out.add_(self.bias)

    @property
    def bytes(self) -> int:
        """That a pass reads."""
        return self.weight.numel() * self.weight.element_size()


class Int8Linear:
    """x (s * Q)^T + b, with Q in 8-bit integers and one scale per output feature: a quarter of float32's bytes.

    Q is the weight divided by s and rounded, s = max |row| / 127.

    Args:
        weight: [O, I].
        bias: [O] or None.
        dtype: to compute in.

    Raises:
        NotImplementedError: where torch has no such kernel (it has one for CPUs).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        if weight.device.type != "cpu":
            raise NotImplementedError("weights=int8: torch has the kernel for CPUs only; use native weights")
        wide = weight.detach().to(torch.float32)
        scales = (wide.abs().amax(dim=1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        self.weight = (wide / scales[:, None]).round().to(torch.int8)
        self.scales = scales.to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        out = torch._weight_int8pack_mm(x.contiguous(), self.weight, self.scales)
        return out if self.bias is None else out.add_(self.bias)

    def onto(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x W^T + b, [T, O]."""
        return residual + self(x)

    @property
    def bytes(self) -> int:
        """That a pass reads."""
        return self.weight.numel()


Linear = DenseLinear | Int8Linear


def lean_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, kind: str = "native") -> Linear:
    """A linear layer of that kind, see `WEIGHT_KINDS`."""
    return Int8Linear(weight, bias, dtype) if kind == "int8" else DenseLinear(weight, bias, dtype)


class LeanNorm:
    """LayerNorm or RMSNorm over the last axis, as `TorchNorm`.

    Args:
        weight: [H] gain, or gain - 1 if `zero_centered`.
        bias: [H] or None.
        eps: added to the variance.
        rms: RMSNorm rather than LayerNorm.
        zero_centered: see `weight`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float, rms: bool, zero_centered: bool):
        self.weight = weight.detach() + 1.0 if zero_centered else weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.eps, self.rms, self.shape = eps, rms, (len(weight),)

    @classmethod
    def of(cls, module: Any) -> "LeanNorm":
        """From a `TorchNorm`."""
        return cls(module.weight, module.bias, module.eps, module.rms, module.zero_centered)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H], in the input's dtype."""
        weight = self.weight.to(x.dtype)
        if self.rms:
            return rms_norm(x, self.shape, weight, self.eps)
        return layer_norm(
            x, self.shape, weight, None if self.bias is None else self.bias.to(x.dtype), self.eps
        )


def is_lean_norm(module: Any) -> bool:
    """Whether `LeanNorm.of` reads the module."""
    return type(module) is TorchNorm


def sum_over_ranks(x: Tensor, world: int) -> Tensor:
    """Sums partial results of tensor-parallel ranks, in place. Collectives: an all-reduce where `world` > 1."""
    return x if world == 1 else reduce_over_ranks(x)
