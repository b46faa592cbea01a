# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Stochastic depth: in each micro-batch, samples skip layers (LayerSkip, arXiv:2404.16710 section 4.1)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.utils import make_viewless_tensor
from torch import Tensor


@dataclass(frozen=True)
class LayerDropout:
    """Which samples of one micro-batch skip which layers: the same on every rank that sees the micro-batch,
    and again when layers are recomputed or a run is resumed.

    Attributes:
        rates: layer (1-based) -> share of samples that skip it.
        seed: of the micro-batch: the run's seed, step, micro-batch and data-parallel rank.
    """

    rates: dict[int, float]
    seed: tuple[int, int, int, int]

    def __call__(self, layer: int, before: Tensor, after: Tensor) -> Tensor:
        """[S, B, H] before and after a layer -> what the next layer gets."""
        rate = self.rates.get(layer, 0.0)
        if rate == 0.0:
            return after
        skipping = (~self.kept(layer, before.shape[1])).nonzero()[:, 0].tolist()
        if not skipping:
            return after
        kept = torch.ones(before.shape[1], dtype=torch.bool, device=after.device)
        for sample in skipping:
            kept[sample].fill_(False)  # to copy the draws there, the host would wait for the device
        return torch.where(kept[None, :, None], after, before)

    def kept(self, layer: int, batch_size: int) -> Tensor:
        """[B] on the host, whether each sample goes through the layer."""
        mixed = 0
        for part in (*self.seed, layer):
            mixed = (mixed * 1_000_003 + part + 1) % (2**61 - 1)
        generator = torch.Generator().manual_seed(mixed)
        return torch.rand(batch_size, generator=generator) >= self.rates[layer]


def before_backward(output: Tensor, action: Callable[[], None]) -> Tensor:
    """The same tensor; `action` runs when a backward pass reaches it."""
    return make_viewless_tensor(_BeforeBackward.apply(output, action), True, True)


class _BeforeBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, action: Callable[[], None]) -> Tensor:
        ctx.action = action
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        ctx.action()
        return gradient, None
