# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Linear layers and whole transformer layers through our CPU kernels, for passes of few tokens.

Suffixes: T tokens, I input features, O output features, H hidden size.
"""

import os
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nemo_ee.decoding.cpu.kernels.compiled import team
from nemo_ee.decoding.cpu.kernels.layer import Layer, addresses, kept_at, run_layers, shape_of
from nemo_ee.decoding.cpu.kernels.norm import Norm
from nemo_ee.decoding.cpu.kernels.products import Linear, product
from nemo_ee.decoding.cpu.kernels.quantise import largest, quantise
from nemo_ee.decoding.cpu.kernels.readout import Head, read_out
from nemo_ee.modeling.row_summary import RowSummary

KERNEL_TOKENS = 24
"""Passes of at most so many tokens go through the kernels; for more, MKL's blocked products are faster."""
SWITCH = "NEMO_EE_CPU_KERNELS"
"""An environment variable: 0 decodes with torch's operations alone."""

ONE_AT_A_TIME = Lock()
"""Numba's simplest thread pool, taken where there is no OpenMP, must not be entered twice."""


def runs_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels for what is on that device and computed in that dtype."""
    return (
        device.type == "cpu"
        and dtype in (torch.float32, torch.float64)
        and os.environ.get(SWITCH, "1") != "0"
    )


def kernel_linear(weight: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """Views of tensors as kernels read them.

    Args:
        weight: [O, I] in `dtype`, int8 or bfloat16.
        scale: [O] factors of the rows.
        bias: [O].
        dtype: to compute in.
    """
    bits = weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight
    return Linear(bits.contiguous().numpy(), _array(scale, dtype), _array(bias, dtype))


def kernel_norm(norm: Any, dtype: torch.dtype) -> Norm:
    """A `LeanNorm`, or None, as kernels read it."""
    if norm is None:
        return Norm.none(_array(None, dtype))
    return Norm(_array(norm.weight, dtype), _array(norm.bias, dtype), float(norm.eps), bool(norm.rms))


def threads() -> int:
    """As many as torch uses, ready for a kernel."""
    mine = torch.get_num_threads()
    threads, is_news = team(mine)
    if is_news:
        torch.set_num_threads(mine)  # Numba's pool, where it is made, sets OpenMP's number for all
    return threads


def run_product(linear: Linear, x: Tensor) -> Tensor:
    """x W^T + b, [T, I] -> [T, O]."""
    out = x.new_empty(len(x), len(linear.weight))
    with ONE_AT_A_TIME:
        product(*linear, x.contiguous().numpy(), out.numpy(), threads())
    return out


class EightBitRows(NamedTuple):
    """A matrix in 8 bits.

    Attributes:
        scales: [O] bfloat16.
        quantised: [O, I] int8.
        lengths: [3, O] float64: of each row, of scale x quantised, and of their difference.
    """

    scales: Tensor
    quantised: Tensor
    lengths: Tensor


def run_quantise(weight: Tensor) -> EightBitRows:
    """Of [O, I] float32 or float64 on a CPU: each row over its scale, rounded; the scale is max |row| / 127."""
    rows, count = weight.contiguous().numpy(), len(weight)
    most = np.empty(count, rows.dtype)
    with ONE_AT_A_TIME:
        largest(rows, most, threads())
    scales = eight_bit_scales(torch.from_numpy(most))
    quantised, lengths = np.empty(rows.shape, np.int8), np.empty((3, count))
    with ONE_AT_A_TIME:
        quantise(rows, scales.to(weight.dtype).numpy(), quantised, lengths, threads())
    return EightBitRows(scales, *map(torch.from_numpy, (quantised, lengths)))


def eight_bit_scales(largest: Tensor) -> Tensor:
    """[O] in bfloat16, of rows with these largest magnitudes [O]."""
    return (largest.float() / 127).clamp_min(torch.finfo(torch.float32).tiny).to(torch.bfloat16)


class HeadOutput(NamedTuple):
    """What a head says about N tokens, see `read_out`.

    Attributes:
        logits: [N, R], or [N, R + 1] with a bucket.
        tokens: [N] the most probable.
        confidence: [N] their probability.
        reduced: [N] each of `RowSummary`.
    """

    logits: Tensor
    tokens: Tensor
    confidence: Tensor
    reduced: tuple[np.ndarray, ...]

    @property
    def summary(self) -> RowSummary:
        """Of the logits, for other ranks."""
        return RowSummary(*map(torch.from_numpy, self.reduced))


def run_head(head: Head, emittable: int, x: Tensor) -> HeadOutput:
    """From states [N, H]."""
    logits, token, sure, *reduced = head_arrays(head, emittable, x.contiguous().numpy())
    return HeadOutput(*map(torch.from_numpy, (logits, token, sure)), tuple(reduced))


def head_arrays(head: Head, emittable: int, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """Logits, tokens, confidences and the summary of `HeadOutput`. NumPy makes the arrays: with cold caches each of
    torch's operations takes 20 to 100 microseconds."""
    kind, count = head.bucket.dtype, len(x)
    logits = np.empty((count, len(head.projection.weight) + bool(head.bucket.size)), kind)
    best, log_sum, sure = np.empty(count, kind), np.empty(count, kind), np.empty(count, kind)
    row, token = np.empty(count, np.int64), np.empty(count, np.int64)
    arrays = logits, best, row, log_sum, token, sure
    with ONE_AT_A_TIME:
        read_out(head, emittable, x, *arrays, threads())
    return logits, token, sure, best, row, log_sum


class KernelLayers:
    """Layers with their caches, in one call.

    Args:
        layers: their weights, all of one shape, and their caches [2, N, G, L, D], in the dtype to compute in.
        kept: of each, where the states behind it are kept, [N, L, H] in that dtype; None for nowhere.
        rotates: which of them have rotary position embeddings.
    """

    def __init__(
        self, layers: list[tuple[Layer, np.ndarray]], kept: list[np.ndarray | None], rotates: list[bool]
    ):
        self._memory = layers, kept  # what the addresses are of
        self._table = np.array(
            [[*addresses(*each), kept_at(hidden)] for each, hidden in zip(layers, kept, strict=True)]
        )
        self._shape, self._weights = shape_of(*layers[0]), layers[0][0].qkv.weight
        self._rotates = np.array(rotates)

    def __call__(self, x: Tensor, places: tuple[np.ndarray, ...], rotation: tuple[np.ndarray, ...]) -> Tensor:
        """Writes the tokens' keys, values and kept states; returns the last layer's output, [T, H] -> [T, H].

        Args:
            x: the states.
            places: [T] rows of the caches, [T] positions.
            rotation: [L, features that rotate] cosines and sines; [0, 0] if no layer rotates.
        """
        return torch.from_numpy(self.run(x.contiguous().numpy(), places, rotation))

    def run(
        self, x: np.ndarray, places: tuple[np.ndarray, ...], rotation: tuple[np.ndarray, ...]
    ) -> np.ndarray:
        """The same, of arrays."""
        out = np.empty_like(x)
        arrays = (x, out, *places, self._rotates, *rotation)
        with ONE_AT_A_TIME:
            run_layers(self._table, self._shape, self._weights, *arrays, threads())
        return out


def _array(tensor: Tensor | None, dtype: torch.dtype) -> np.ndarray:
    """A view, or [0]."""
    return torch.empty(0, dtype=dtype).numpy() if tensor is None else tensor.to(dtype).contiguous().numpy()
