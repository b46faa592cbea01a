# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""How often CUDA graphs are replayed, whoever does."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch


@contextmanager
def counted_replays() -> Iterator[Counter]:
    """Counts replays of CUDA graphs within, under `replays`."""
    counter: Counter = Counter()
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: Any) -> None:
        counter["replays"] += 1
        replay(graph)

    with patch.object(torch.cuda.CUDAGraph, "replay", counted):
        yield counter
