# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The weights of linear layers and norms as plain functions, for decoding: no modules, no autograd Functions.

Suffixes: T tokens, I input features, O output features of this tensor-parallel rank.
"""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, rms_norm

from nemo_ee.decoding.cpu.cpu_kernels import (
    KERNEL_TOKENS,
    eight_bit_scales,
    kernel_linear,
    run_product,
    run_quantise,
    runs_kernels,
)
from nemo_ee.decoding.cpu.kernels.compiled import is_zen
from nemo_ee.decoding.cpu.kernels.products import Linear
from nemo_ee.modeling.vocab_parallel import reduce_over_ranks

WEIGHT_KINDS = ("native", "bf16", "int8")
"""How decoding holds weights: as they are; rounded to bfloat16, which reads half the bytes of float32 (CPU; computed
in float32, and exact where a checkpoint's numbers are bfloat16's, as those of most published models); or as 8-bit
integers with a scale per output feature (CPU)."""
COLUMN_TOKENS = 4, 48
"""Passes of so many tokens, from the first number to the second, compute W x^T on a CPU: MKL is up to twice as fast
with it as with x W^T (float32, 12 tokens: 0.47 to 0.76 of the time, for matrices of 576 x 576 to 49152 x 576)."""
INT8_TOKENS = 8
"""Passes of at most so many tokens use 8-bit weights; for more, products of float32 are as fast."""


class DenseLinear:
    """x W^T + b.

    Args:
        weight: [O, I]; not copied if it has the dtype.
        bias: [O] or None.
        dtype: to compute in.

    Attributes:
        kernels: for passes of at most so many tokens, ascending; none where torch computes.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.transposed = self.weight.t()
        on_cpu = weight.device.type == "cpu"
        self._by_one_dnn = on_cpu and dtype == torch.float32 and one_dnn_is_faster()
        self._has_columns = on_cpu and dtype in (torch.float32, torch.float64) and not self._by_one_dnn
        self.kernels: list[tuple[int, Linear]] = []
        if runs_kernels(weight.device, dtype):
            self.kernels = [(KERNEL_TOKENS, kernel_linear(self.weight, None, self.bias, dtype))]

    def __call__(self, x: Tensor) -> Tensor:
        """[T, I] -> [T, O], not always contiguous."""
        for limit, kernel in self.kernels:
            if len(x) <= limit:
                return run_product(kernel, x)
        if self._by_one_dnn and x.dtype == torch.float32:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        if not self._by_columns(len(x)):
            return linear(x, self.weight, self.bias)
        out = torch.mm(self.weight, x.t()).t()
        return out if self.bias is None else out.add_(self.bias)

    def onto(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x W^T + b, [T, O]: in one operation where dtypes agree."""
        own = self.kernels and len(x) <= self.kernels[-1][0]
        if own or residual.dtype != x.dtype or self._by_one_dnn or self._by_columns(len(x)):
            return residual + self(x)
        out = torch.addmm(residual, x, self.transposed)
        return out if self.bias is None else out.add_(self.bias)

    def _by_columns(self, tokens: int) -> bool:
        return self._has_columns and COLUMN_TOKENS[0] <= tokens <= COLUMN_TOKENS[1]

    @property
    def bytes(self) -> int:
        """That a pass reads."""
        return self.weight.numel() * self.weight.element_size()


def one_dnn_is_faster() -> bool:
    """Whether torch's products of float32 take another way than MKL, which is half as fast on AMD's processors
    (24 to 512 tokens: oneDNN takes 0.36 to 0.54 of the time; two cores of Zen 5)."""
    return torch.backends.mkldnn.is_available() and is_zen()


class Bfloat16Linear(DenseLinear):
    """x W^T + b with W rounded to bfloat16, computed in float32. Memory: half a copy of W; one and a half where the
    rounding changes it.

    Args:
        weight: [O, I].
        bias: [O] or None.
        dtype: float32.

    Raises:
        NotImplementedError: other devices and dtypes.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        if dtype != torch.float32 or not runs_kernels(weight.device, dtype):
            raise NotImplementedError(
                "weights=bf16: for models in float32 on a CPU, by our kernels; use native weights, with precision=bf16"
            )
        half = weight.detach().to(torch.bfloat16)
        rounded = half.to(dtype)
        super().__init__(weight if rounded.equal(weight) else rounded, bias, dtype)
        self.kernels = [(KERNEL_TOKENS, kernel_linear(half, None, self.bias, dtype))]

    @property
    def bytes(self) -> int:
        """That a pass of few tokens reads."""
        return super().bytes // 2


class Int8Linear(DenseLinear):
    """x (s Q)^T + b, with Q in 8-bit integers and one scale per output feature: a quarter of float32's bytes.

    s is max |row| / 127 in bfloat16, Q the weight divided by s and rounded. Our kernels compute in x's dtype;
    torch's, which serve other dtypes, round x to bfloat16. Passes of more than `INT8_TOKENS` tokens, prompts above
    all, wait for arithmetic rather than for bytes and use the weight itself.

    Args:
        weight: [O, I].
        bias: [O] or None.
        dtype: of inputs and outputs.

    Raises:
        NotImplementedError: where torch has no such kernel (it has one for CPUs).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__(weight, bias, dtype)
        if self.weight.device.type != "cpu":
            raise NotImplementedError("weights=int8: there are kernels for CPUs only; use native weights")
        if self.kernels:
            self.scales, self.quantised, _ = run_quantise(self.weight)
            eight_bit = kernel_linear(self.quantised, self.scales, self.bias, dtype)
            self.kernels.insert(0, (INT8_TOKENS, eight_bit))
        else:
            wide = weight.detach().to(torch.float32)
            self.scales = eight_bit_scales(wide.abs().amax(dim=1))
            self.quantised = (wide / self.scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        if self.kernels or len(x) > INT8_TOKENS:
            return super().__call__(x)
        out = torch._weight_int8pack_mm(x.to(torch.bfloat16), self.quantised, self.scales).to(x.dtype)
        return out if self.bias is None else out.add_(self.bias)

    def onto(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x W^T + b, [T, O]."""
        return residual + self(x)

    @property
    def bytes(self) -> int:
        """That a pass of few tokens reads."""
        return self.quantised.numel()


class EightBitLinear(Int8Linear):
    """`Int8Linear` that reads 8 bits for passes of any size, in pieces of `KERNEL_TOKENS`, so that what it computes for
    a token does not depend on how many come with it. With our kernels only."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__(weight, bias, dtype)
        self.kernels = [(KERNEL_TOKENS, self.kernels[0][1])]

    def __call__(self, x: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        if len(x) <= KERNEL_TOKENS:
            return super().__call__(x)
        return torch.cat([super(EightBitLinear, self).__call__(part) for part in x.split(KERNEL_TOKENS)])


HEAD_KIND = "int8 at any size"
"""How exits' heads are held where they are asked through our CPU kernels: see `EightBitLinear`. Of the weights as they
are, whichever kind all others are: so exits say the same for all kinds, and nothing is rounded twice."""
_KINDS = {"native": DenseLinear, "bf16": Bfloat16Linear, "int8": Int8Linear, HEAD_KIND: EightBitLinear}


def lean_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, kind: str = "native") -> DenseLinear:
    """A linear layer of that kind, see `WEIGHT_KINDS` and `HEAD_KIND`."""
    return _KINDS[kind](weight, bias, dtype)


class LeanNorm:
    """LayerNorm or RMSNorm over the last axis.

    Args:
        weight: [H] gain, or gain - 1 if `zero_centered`.
        bias: [H] or None.
        eps: added to the variance.
        rms: RMSNorm rather than LayerNorm.
        zero_centered: see `weight`.
        wide_gain: add the 1 of a zero-centred gain in float32, as Transformer Engine's kernels do, and not in the
            weight's dtype, as `TorchNorm` does: in bfloat16 1.003 is 1.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        rms: bool,
        zero_centered: bool,
        wide_gain: bool = False,
    ):
        gain = weight.detach()
        self._wide = wide_gain and zero_centered
        if self._wide:
            gain = gain.to(torch.promote_types(gain.dtype, torch.float32))
        self.weight = gain + 1.0 if zero_centered else gain
        self.bias = None if bias is None else bias.detach()
        self.eps, self.rms, self.shape = eps, rms, (len(weight),)
        # With these, x / sqrt(mean(x^2) + eps) takes three operations; torch's own takes twice as long on a CPU.
        self._scaled = self.weight * len(weight) ** 0.5
        self._floor = torch.tensor((eps * len(weight)) ** 0.5, dtype=self.weight.dtype)
        on_cpu = weight.device.type == "cpu"
        self._few = rms and on_cpu and self.weight.dtype in (torch.float32, torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H], in the input's dtype, also where autocast computes norms in float32."""
        if self._few and x.dtype == self.weight.dtype:
            norm = torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self._floor)
            return x.div(norm).mul_(self._scaled)
        kind = torch.promote_types(x.dtype, self.weight.dtype) if self._wide else x.dtype
        weight = self.weight.to(kind)
        if self.rms:
            out = rms_norm(x.to(kind), self.shape, weight, self.eps)
        else:
            bias = None if self.bias is None else self.bias.to(kind)
            out = layer_norm(x.to(kind), self.shape, weight, bias, self.eps)
        return out.to(x.dtype)


def sum_over_ranks(x: Tensor, world: int) -> Tensor:
    """Sums partial results of tensor-parallel ranks. Collectives: an all-reduce where `world` > 1."""
    return x if world == 1 else reduce_over_ranks(x.contiguous())
