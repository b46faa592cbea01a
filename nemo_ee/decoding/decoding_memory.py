# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What a decoder remembers of its sequences: keys and values of all layers, and hidden states at exits."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from nemo_ee.decoding.decoding_model import DecodingModel
from nemo_ee.decoding.layers.segment import Segment

KV_POLICIES = ("catch_up", "recompute", "state_copy")
"""What happens to keys and values of tokens that left early. `catch_up`: filled when a later token goes on.
`recompute`: the tokens are run again from the first layer, with every new token until one goes all the way
(EE-LLM, arXiv:2312.04916, section 4.1); the same outputs, more work. `state_copy`: the exit's hidden state
stands in for those of all deeper layers (CALM, arXiv:2207.07061, section 3.4); an approximation."""


class DecodingMemory:
    """Caches of so many rows and positions, with the layers that fill them.

    Args:
        model: the whole model, on one pipeline stage.
        exit_layers: exits whose hidden states are kept, ascending; layers can be cut there.
        rows: sequences that fit.
        positions: per sequence.

    Attributes:
        rows: as given.
        table: the positions.
        attention: of the layers.
        blocks: exit layer -> its block with a cache, or None.
        hidden: exit layer -> [rows, positions, H] states behind the layer.
    """

    def __init__(self, model: DecodingModel, exit_layers: Sequence[int], rows: int, positions: int):
        self.rows, self.table, self.attention = rows, model.table(positions), model.attention
        self.blocks = {n: model.cached_block(n, rows, positions) for n in exit_layers}
        size = model.hidden.shape[-1]
        self.hidden: dict[int, Tensor] = {
            n: model.hidden.new_zeros(rows, positions, size) for n in exit_layers
        }
        self._layers = model.cached_layers(rows, positions)
        self._edges = [0, *exit_layers, model.final_layer]
        self._segments: dict[tuple[int, int], Segment] = {}

    def cuts(self, low: int = 0, high: int | None = None) -> list[tuple[int, int]]:
        """The layers from low + 1 to high, cut at all exits between: pairs like (low, high). None: to the last."""
        return list(pairwise(n for n in self._edges if low <= n and (high is None or n <= high)))

    def segment(self, low: int, high: int) -> Segment:
        """The layers from low + 1 to high; `low` is an exit's layer or 0, `high` an exit's or the last layer."""
        if (low, high) not in self._segments:
            layers = [self._layers[n] for n in range(low + 1, high + 1)]
            kept = {n - low - 1: hidden for n, hidden in self.hidden.items() if low < n <= high}
            self._segments[low, high] = Segment(layers, kept)
        return self._segments[low, high]

    def clear(self) -> None:
        """Makes everything zeros: a masked key has weight 0, but 0 times what is no number is none either."""
        for block in [*self.blocks.values(), self.segment(self._edges[0], self._edges[-1])]:
            if block is not None:
                block.clear()
