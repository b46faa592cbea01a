# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""How fast decoding could be if it did nothing but read: bytes per token, and this machine's bandwidth."""

import statistics
from typing import Any

import torch
from harness import seconds

COLUMNS, READINGS = 4096, 3


class Bandwidth:
    """Reads `size` bytes, those of the weights, so that caches help as much as they do there, with torch's threads.
    `readings`: bytes per second of a matrix-vector product, and of a copy (which reads and writes)."""

    def __init__(self, size: int, device: torch.device):
        buffer = torch.ones(max(1, size // (4 * COLUMNS)), COLUMNS, device=device)
        vector, other, read = torch.ones(COLUMNS, device=device), torch.zeros_like(buffer), 4 * buffer.numel()
        self._kinds = {"matrix-vector product": (read, lambda: torch.mv(buffer, vector))}
        self._kinds["copy"] = (2 * read, lambda: other.copy_(buffer))
        self.readings: dict[str, list[float]] = {kind: [] for kind in self._kinds}

    def read(self) -> None:
        """Adds a reading of each kind, the best of a few."""
        for kind, (moved, work) in self._kinds.items():
            self.readings[kind].append(max(moved / seconds(work) for _ in range(READINGS)))

    def medians(self) -> dict[str, float]:
        """Of all readings of a kind."""
        return {kind: statistics.median(values) for kind, values in self.readings.items()}


def weight_bytes(gpt: Any) -> int:
    """Of all weights that a token at full depth meets: the layers, the final norm and the output layer."""
    weights = [*gpt.decoder.parameters(), gpt.output_weight()]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def cache_bytes(gpt: Any, length: int) -> int:
    """Of the keys and values that a sequence's next token meets after `length` tokens."""
    per_layer = 2 * gpt.config.num_query_groups * gpt.config.kv_channels * length
    return gpt.config.num_layers * per_layer * gpt.output_weight().element_size()
