# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What the passes of lossless decoding cost, known without measuring them."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from nemo_ee.megatron.decoding_model import DecodingModel

GROWTH = {
    "native": ((1, 1.0), (3, 1.13), (4, 1.7), (16, 1.86), (32, 2.65), (64, 4.8)),
    "packed": ((1, 1.0), (3, 1.3), (4, 1.6), (8, 1.8), (16, 2.1), (32, 3.0), (64, 5.0)),
    "int8": ((1, 1.0), (2, 1.1), (4, 1.32), (5, 1.95), (8, 2.1), (9, 2.4), (16, 2.5), (32, 3.5), (64, 6.5)),
    "gpu": ((1, 1.0), (64, 1.2), (256, 2.0)),
}
"""Kind of weights -> (tokens of a pass, its time over that of one token), linear in between.

Decoding reads all weights for a pass, whatever its tokens, so that further ones are cheap until arithmetic
dominates. On a CPU that is soon, and kernels change with the number of tokens: measured in float32 with
SmolLM2-135M, torch 2.13, two cores of x86. The GPU's is an assumption: its arithmetic is about 200 times its
bandwidth."""


DRAFT_HEAD = 0.6
"""Time of an 8-bit exit head over the float32 one's, measured likewise."""


@dataclass(frozen=True)
class PassCosts:
    """Costs of passes, in any unit. The same request then drafts alike, on every rank and in every run.

    Attributes:
        to_exit: of one token from the first layer to each exit in use, ascending.
        head: of each of these exits.
        full: of one token through all layers and the output layer.
        growth: see `GROWTH`.
    """

    to_exit: tuple[float, ...]
    head: tuple[float, ...]
    full: float
    growth: tuple[tuple[float, float], ...]

    def full_depth(self, tokens: float) -> float:
        """Tokens in one pass without exits."""
        return self.full * self.grown(tokens)

    def shallow(self, exit_index: int, tokens: float) -> float:
        """Tokens in one pass to an exit that is not asked."""
        return self.to_exit[exit_index] * self.grown(tokens)

    def asked(self, exit_index: int, tokens: float) -> float:
        """An exit's head on tokens."""
        return self.head[exit_index] * self.grown(tokens)

    def verify(self, exit_index: int, tokens: float) -> float:
        """Tokens in one pass from an exit on."""
        return (self.full - self.to_exit[exit_index]) * self.grown(tokens)

    def grown(self, tokens: float) -> float:
        """Cost of a pass of tokens over that of one."""
        points = self.growth
        at = min(max(bisect_right(points, (tokens, inf)), 1), len(points) - 1)
        (low, below), (high, above) = points[at - 1], points[at]
        return max(below + (above - below) * (tokens - low) / (high - low), 1.0)


def pass_costs(model: DecodingModel, exit_layers: Sequence[int]) -> PassCosts:
    """Costs as the bytes of weights that passes read."""
    assert model.output is not None, "the whole model, on one pipeline stage"
    sizes = {n: model.layer_bytes(n) for n in model.layers}
    return PassCosts(
        to_exit=tuple(float(sum(size for n, size in sizes.items() if n <= last)) for last in exit_layers),
        head=tuple(_head_cost(model, n) for n in exit_layers),
        full=float(sum(sizes.values()) + model.output.bytes),
        growth=GROWTH[model.weights if model.device.type == "cpu" else "gpu"],
    )


def _head_cost(model: DecodingModel, layer: int) -> float:
    """Of an exit that drafts."""
    own_weights = model.draft_heads[layer] is not model.heads[layer]
    return model.heads[layer].bytes * (DRAFT_HEAD if own_weights else 1.0)
