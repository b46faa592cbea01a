# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Prices of passes by the bytes that they read, where none were measured."""

from nemo_ee.decoding.cpu.lean_weights import EightBitLinear
from nemo_ee.decoding.decoding_model import DecodingModel
from nemo_ee.decoding.layers.lean_head import SearchedOutput
from nemo_ee.decoding.pass_prices import PassPrices

ASSUMED = "assumed by bytes of weights"
TOKENS = (1, 2, 4, 5, 8, 9, 12, 13, 16, 17, 24, 32, 64)
GROWTH = {
    "native": (1.0, 1.02, 1.16, 1.47, 1.53, 1.94, 1.96, 2.4, 2.47, 2.9, 3.6, 4.7, 7.8),
    "bf16": (1.0, 1.04, 1.26, 1.95, 2.08, 2.94, 2.96, 3.8, 3.88, 4.7, 5.8, 7.3, 12.2),
    "int8": (1.0, 1.24, 1.74, 2.83, 2.93, 4.3, 4.4, 5.6, 5.7, 6.9, 8.2, 10.3, 18.0),
    "gpu": (1.0, 1.003, 1.01, 1.013, 1.02, 1.025, 1.035, 1.04, 1.05, 1.05, 1.07, 1.1, 1.2),
}
"""Kind of weights -> time of a pass of `TOKENS` tokens over that of one.

Decoding reads all weights for a pass, whatever its tokens, so that further ones are cheap until arithmetic
dominates. On a CPU that is soon, and our kernels take four tokens at a time: measured in float32 with
SmolLM2-135M, torch 2.13, two cores of x86. The GPU's is an assumption: its arithmetic is about 200 times its
bandwidth."""
EIGHT_BIT = 1.6
"""Time of reading a byte of 8-bit heads, or of the search of the output layer, over that of one of float32, measured
likewise: 0.4 of a float32 head's."""
START = {"cpu": 4e6, "gpu": 600e6}
"""What starting a pass or asking a head costs beside its weights, as bytes that are read in that time: about 0.15 ms on
two cores of x86 that read 25 GB/s, measured likewise; on a GPU 0.3 ms at 2 TB/s, an assumption."""
BANDWIDTH = {"cpu": 25e9, "gpu": 2e12}
"""Bytes per second; decisions do not depend on it."""


def prices_of(model: DecodingModel) -> PassPrices:
    """The model's prices as they were measured, or by bytes."""
    return model.prices or assumed_prices(model)


def assumed_prices(model: DecodingModel) -> PassPrices:
    """Prices by the bytes of weights that passes read, and `START`.

    Args:
        model: the whole model, on one pipeline stage.
    """
    output, greedy = model.output, model.greedy_output
    assert output is not None and greedy is not None, "the whole model, on one pipeline stage"
    device = "cpu" if model.device.type == "cpu" else "gpu"
    growth, second = GROWTH[model.weights if device == "cpu" else "gpu"], BANDWIDTH[device]

    def seconds(size: float, start: float = 0.0, eight_bits: bool = False) -> tuple[float, ...]:
        if not eight_bits or model.weights == "int8":
            return tuple((start + size * factor) / second for factor in growth)
        return tuple((start + EIGHT_BIT * size * factor) / second for factor in GROWTH["int8"])

    start, layers = START[device], [model.layer_bytes(n) for n in model.layers]
    exits, whole = tuple(sorted(model.heads)), seconds(output.bytes)

    def head(n: int) -> tuple[float, ...]:
        read = model.heads[n]
        own = seconds(read.bytes, start, isinstance(read.projection, EightBitLinear))
        block = seconds(model.blocks[n].bytes if n in model.blocks else 0)
        return tuple(map(sum, zip(own, block, strict=True)))

    searched = whole
    if isinstance(greedy, SearchedOutput):
        by_search = seconds(greedy.bytes, eight_bits=True)
        few = sum(tokens <= greedy.search.limit for tokens in TOKENS)
        searched = by_search[:few] + whole[few:]
    return PassPrices(
        num_layers=len(layers),
        tokens=TOKENS,
        start=(start / second,) * len(TOKENS),
        layer=seconds(sum(layers) / len(layers)),
        output_layer=whole,
        greedy_output=searched,
        exits=exits,
        heads=tuple(map(head, exits)),
        weights=model.weights,
        output_kind=model.output_kind,
        source=ASSUMED,
    )
