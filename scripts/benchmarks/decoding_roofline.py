# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""How fast decoding could be if it did nothing but read: bytes per token, and this machine's bandwidth."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from decoding_passes import timed

from nemo_ee.inference.generate import generating
from nemo_ee.megatron.decoding_model import DecodingModel
from nemo_ee.megatron.lean_layer import LeanLayer

COLUMNS, READINGS = 4096, 3


class Bandwidth:
    """Reads memory in three ways, with torch's threads.

    Args:
        size: bytes of the float32 buffer; that of the weights, so that caches help as much as they do there.
        device: where it is.

    Attributes:
        readings: bytes per second of a matrix-vector product, a sum, and a copy (which reads and writes).
    """

    def __init__(self, size: int, device: torch.device):
        buffer = torch.ones(max(1, size // (4 * COLUMNS)), COLUMNS, device=device)
        vector, other = torch.ones(COLUMNS, device=device), torch.zeros_like(buffer)
        read = 4 * buffer.numel()
        self._kinds: dict[str, tuple[int, Callable[[], Any]]] = {
            "matrix-vector product": (read, lambda: torch.mv(buffer, vector)),
            "sum": (read, buffer.sum),
            "copy": (2 * read, lambda: other.copy_(buffer)),
        }
        self.readings: dict[str, list[float]] = {kind: [] for kind in self._kinds}

    def read(self) -> None:
        """Adds a reading of each kind, the best of a few."""
        for kind, (moved, run) in self._kinds.items():
            self.readings[kind].append(max(moved / timed(run)[1] for _ in range(READINGS)))

    def medians(self) -> dict[str, float]:
        """Of all readings of a kind."""
        return {kind: statistics.median(values) for kind, values in self.readings.items()}


class Products:
    """The matrix-vector products of a token at full depth and nothing else: each in a
    call of its own.

    Args:
        model: a `MegatronGPTEarlyExitModel`.

    Attributes:
        readings: kind of weights -> seconds per token; kinds that the device has.
    """

    def __init__(self, model: Any):
        self.readings: dict[str, list[float]] = {}
        self._linears: dict[str, list[tuple[Any, torch.Tensor]]] = {}
        self._model = model
        for kind in ("native", "bf16", "int8"):
            with generating(model):
                try:
                    decoding = DecodingModel(model.gpt, kind)
                except NotImplementedError:
                    continue
                linears = [decoding.output.projection]
                for layer in decoding.layers.values():
                    if not isinstance(layer, LeanLayer):
                        return
                    linears += [layer.qkv, layer.out, layer.mlp.up, layer.mlp.down]
                self._linears[kind] = [
                    (each, each.weight.new_ones(1, each.weight.shape[1])) for each in linears
                ]
                self.readings[kind] = []

    def read(self) -> None:
        """Adds a reading of each kind, the best of a few."""
        with generating(self._model):
            for kind, linears in self._linears.items():
                runs = [timed(lambda: [linear(x) for linear, x in linears])[1] for _ in range(READINGS)]  # noqa: B023
                self.readings[kind].append(min(runs))

    def medians(self) -> dict[str, float]:
        """Of all readings of a kind."""
        return {kind: statistics.median(values) for kind, values in self.readings.items()}


def weight_bytes(gpt: Any) -> int:
    """Of all weights that a token at full depth meets: the layers, the final norm and the output layer."""
    output = gpt.output_weight()
    layers = sum(weight.numel() * weight.element_size() for weight in gpt.decoder.parameters())
    return layers + output.numel() * output.element_size()


def cache_bytes(gpt: Any, length: int) -> int:
    """Of the keys and values that a sequence's next token meets after `length` tokens."""
    config = gpt.config
    per_layer = 2 * config.num_query_groups * config.kv_channels * length
    return config.num_layers * per_layer * gpt.output_weight().element_size()
