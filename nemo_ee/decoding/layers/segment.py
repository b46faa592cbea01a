# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Consecutive layers with their caches, run one after the other: between two exits, or an exit's own block.

Suffixes: T packed tokens, H hidden size.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from torch import Tensor

from nemo_ee.decoding.cpu.cpu_kernels import KernelLayers
from nemo_ee.decoding.cpu.kernels.layer import shape_of
from nemo_ee.decoding.layers.cached_layers import CachedLayer
from nemo_ee.decoding.layers.packed_tokens import PackedTokens


class Segment:
    """Layers; passes of few tokens on a CPU go through our kernels, layers of equal shape in one call.

    Args:
        layers: one at least.
        kept: index of a layer -> [rows, positions, H], where the states behind it are kept.
    """

    def __init__(self, layers: Sequence[CachedLayer], kept: Mapping[int, Tensor] | None = None):
        self._layers, self._kept = list(layers), dict(kept or {})
        pairs = [(layer, self._kept.get(n)) for n, layer in enumerate(self._layers)]
        groups = groupby(pairs, key=lambda pair: _kernel_shape(*pair))
        self._groups = [_Group(list(members), shape is not None) for shape, members in groups]

    def __iter__(self) -> Iterator[CachedLayer]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __call__(self, x: Tensor, packed: PackedTokens) -> Tensor:
        """Writes the tokens' keys, values and kept states; returns the last layer's output, [T, H] -> [T, H].

        Collectives: two all-reduces of [T, H] per layer where TP > 1.
        """
        for group in self._groups:
            x = group(x, packed)
        return x

    @property
    def kernels(self) -> list[tuple[list[tuple[int, KernelLayers]], bool]] | None:
        """Of groups of layers in a row: our kernels for passes of at most so many tokens, and whether one of
        them rotates. None where some layers have none."""
        kernels = [(group.kernels, group.rotates) for group in self._groups]
        return kernels if all(each for each, _ in kernels) else None

    def fill(self, x: Tensor, packed: PackedTokens) -> Tensor:
        """Writes keys and values of all layers as if [T, H] were the input of each; returns it."""
        for layer in self._layers:
            layer.fill(x, packed)
        return x

    def clear(self) -> None:
        """Makes all keys, values and kept states zeros."""
        for tensor in [*(layer.cache for layer in self._layers), *self._kept.values()]:
            tensor.zero_()

    def clear_row(self, row: int, length: int) -> None:
        """Makes the first `length` keys, values and kept states of a row zeros."""
        for layer in self._layers:
            layer.cache[:, row, :, :length].zero_()
        for hidden in self._kept.values():
            hidden[row, :length].zero_()

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` keys, values and kept states of one row to another."""
        for layer in self._layers:
            layer.move(source, target, length)
        for hidden in self._kept.values():
            hidden[target, :length] = hidden[source, :length]


class _Group:
    """Layers that run in one call where they have kernels."""

    def __init__(self, pairs: list[tuple[CachedLayer, Tensor | None]], has_kernels: bool):
        self._pairs = pairs
        rotates = [layer.rotary for layer, _ in pairs]
        self.rotates = any(rotates)
        self.kernels: list[tuple[int, KernelLayers]] = []
        if has_kernels:
            kept = [None if hidden is None else hidden.numpy() for _, hidden in pairs]
            for kernels in zip(*(layer.mathematics.kernels for layer, _ in pairs), strict=True):
                parts = [
                    (each, layer.cache.numpy()) for (_, each), (layer, _) in zip(kernels, pairs, strict=True)
                ]
                self.kernels.append((kernels[0][0], KernelLayers(parts, kept, rotates)))

    def __call__(self, x: Tensor, packed: PackedTokens) -> Tensor:
        for limit, kernel in self.kernels:
            if len(x) <= limit:
                return kernel(x, packed.places, packed.table.rotation(x.dtype, self.rotates))
        for layer, hidden in self._pairs:
            x = layer(x, packed)
            if hidden is not None:
                packed.store(x, hidden)
        return x


def _kernel_shape(layer: CachedLayer, hidden: Tensor | None) -> Any:
    """What layers must share to run in one call; None where there are no kernels."""
    if hidden is not None and hidden.dtype != layer.cache.dtype:
        return None
    kernels = layer.mathematics.kernels
    return [(limit, shape_of(each, layer.cache.numpy())) for limit, each in kernels] or None
