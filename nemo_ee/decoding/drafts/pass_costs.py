# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What the passes of lossless decoding cost, known without measuring them."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from nemo_ee.decoding.cpu.lean_weights import EightBitLinear
from nemo_ee.decoding.decoding_model import DecodingModel

GROWTH = {
    "native": (
        *((1, 1.0), (2, 1.02), (4, 1.16), (5, 1.47), (8, 1.53), (9, 1.94), (12, 1.96), (13, 2.4), (16, 2.47)),
        *((17, 2.9), (24, 3.6), (25, 4.05), (32, 4.7), (64, 7.8)),
    ),
    "bf16": (
        *((1, 1.0), (2, 1.04), (4, 1.26), (5, 1.95), (8, 2.08), (9, 2.94), (12, 2.96), (13, 3.8), (16, 3.88)),
        *((17, 4.7), (24, 5.8), (25, 6.7), (32, 7.3), (64, 12.2)),
    ),
    "int8": (
        *((1, 1.0), (2, 1.24), (4, 1.74), (5, 2.83), (8, 2.93), (9, 4.3), (12, 4.4), (13, 5.6), (16, 5.7)),
        *((17, 6.9), (24, 8.2), (25, 9.0), (32, 10.3), (64, 18.0)),
    ),
    "gpu": ((1, 1.0), (64, 1.2), (256, 2.0)),
}
"""Kind of weights -> (tokens of a pass, its time over that of one token), linear in between.

Decoding reads all weights for a pass, whatever its tokens, so that further ones are cheap until arithmetic
dominates. On a CPU that is soon, and our kernels take four tokens at a time: measured in float32 with
SmolLM2-135M, torch 2.13, two cores of x86. The GPU's is an assumption: its arithmetic is about 200 times its
bandwidth."""


DRAFT_HEAD = 0.4
"""Bytes of an 8-bit exit head as time over the float32 one's, measured likewise."""
START = {"cpu": 4e6, "gpu": 600e6}
"""What starting a pass or asking a head costs beside its weights, as bytes that are read in that time: about 0.15 ms on
two cores of x86 that read 25 GB/s, measured likewise; on a GPU 0.3 ms at 2 TB/s, an assumption."""


@dataclass(frozen=True)
class PassCosts:
    """Costs of passes, in any unit. The same request then drafts alike, on every rank and in every run.

    Attributes:
        to_exit: of one token from the first layer to each exit in use, ascending.
        head: of each of these exits.
        full: of one token through all layers and the output layer.
        growth: see `GROWTH`.
        start: of any pass, and of asking a head.
    """

    to_exit: tuple[float, ...]
    head: tuple[float, ...]
    full: float
    growth: tuple[tuple[float, float], ...]
    start: float = 0.0

    def full_depth(self, tokens: float) -> float:
        """Tokens in one pass without exits."""
        return self.start + self.full * self.grown(tokens)

    def shallow(self, exit_index: int, tokens: float) -> float:
        """Tokens in one pass to an exit that is not asked."""
        return self.start + self.to_exit[exit_index] * self.grown(tokens)

    def asked(self, exit_index: int, tokens: float) -> float:
        """An exit's head on tokens."""
        return self.start + self.head[exit_index] * self.grown(tokens)

    def verify(self, exit_index: int, tokens: float) -> float:
        """Tokens in one pass from an exit on."""
        return self.start + (self.full - self.to_exit[exit_index]) * self.grown(tokens)

    def grown(self, tokens: float) -> float:
        """Cost of a pass of tokens over that of one."""
        points = self.growth
        at = min(max(bisect_right(points, (tokens, inf)), 1), len(points) - 1)
        (low, below), (high, above) = points[at - 1], points[at]
        return max(below + (above - below) * (tokens - low) / (high - low), 1.0)


def pass_costs(model: DecodingModel, exit_layers: Sequence[int]) -> PassCosts:
    """Costs as the bytes of weights that passes read, and `START`."""
    assert model.greedy_output is not None, "the whole model, on one pipeline stage"
    sizes = {n: model.layer_bytes(n) for n in model.layers}
    return PassCosts(
        to_exit=tuple(float(sum(size for n, size in sizes.items() if n <= last)) for last in exit_layers),
        head=tuple(_head_cost(model, n) for n in exit_layers),
        full=float(sum(sizes.values()) + model.greedy_output.bytes),
        growth=GROWTH[model.weights if model.device.type == "cpu" else "gpu"],
        start=START["cpu" if model.device.type == "cpu" else "gpu"],
    )


def _head_cost(model: DecodingModel, layer: int) -> float:
    """Of an exit that drafts."""
    head = model.heads[layer]
    own_weights = isinstance(head.projection, EightBitLinear) and model.weights != "int8"
    return head.bytes * (4 * DRAFT_HEAD if own_weights else 1.0)
