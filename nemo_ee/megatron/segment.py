# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Consecutive layers with their caches, run one after the other: between two exits, or an exit's own block.

Suffixes: T packed tokens, H hidden size.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from torch import Tensor

from nemo_ee.kernels.layer import shape_of
from nemo_ee.megatron.cpu_kernels import KernelLayers
from nemo_ee.megatron.decode import CachedLayer, PackedTokens


class Segment:
    """Layers; passes of few tokens on a CPU go through our kernels, layers of equal shape in one call.

    Args:
        layers: one at least.
    """

    def __init__(self, layers: Sequence[CachedLayer]):
        self._layers = list(layers)
        groups = groupby(self._layers, key=_kernel_shape)
        self._groups = [_Group(list(members), shape is not None) for shape, members in groups]

    def __iter__(self) -> Iterator[CachedLayer]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __call__(self, x: Tensor, packed: PackedTokens) -> Tensor:
        """Writes the tokens' keys and values and returns the last layer's output, [T, H] -> [T, H].

        Collectives: two all-reduces of [T, H] per layer where TP > 1.
        """
        for group in self._groups:
            x = group(x, packed)
        return x

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` keys and values of one row to another."""
        for layer in self._layers:
            layer.move(source, target, length)


class _Group:
    """Layers that run in one call where they have kernels."""

    def __init__(self, layers: list[CachedLayer], has_kernels: bool):
        self._layers = layers
        self._rotates = any(layer.rotary for layer in layers)
        self._kernels = []
        if has_kernels:
            rotates = [layer.rotary for layer in layers]
            for kernels in zip(*(layer.mathematics.kernels() for layer in layers), strict=True):
                limit = kernels[0][0]
                parts = [
                    (each, layer.cache.numpy()) for (_, each), layer in zip(kernels, layers, strict=True)
                ]
                self._kernels.append((limit, KernelLayers(parts, rotates)))

    def __call__(self, x: Tensor, packed: PackedTokens) -> Tensor:
        for limit, kernel in self._kernels:
            if len(x) <= limit:
                return kernel(x, packed.places, packed.table.rotation(x.dtype, self._rotates))
        for layer in self._layers:
            x = layer(x, packed)
        return x


def _kernel_shape(layer: CachedLayer) -> Any:
    """What layers must share to run in one call; None where there are no kernels."""
    kernels = layer.mathematics.kernels()
    return [(limit, shape_of(each, layer.cache.numpy())) for limit, each in kernels] or None
