# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Running a model that was built for sequence parallelism without it, as decoding token by token needs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SWITCHES = ("sequence_parallel", "reduce_scatter_embeddings")
"""Attributes of megatron-core's and Transformer Engine's modules that split activations over the sequence."""


@contextmanager
def sequence_parallel_off(module: torch.nn.Module) -> Iterator[None]:
    """Within, every submodule keeps whole sequences on every tensor-parallel rank; restored on leaving.

    NeMo's `_reset_sequence_parallelism_args` leaves the embedding's reduce-scatter on, which megatron-core
    0.13 decides at construction.
    """
    owners = {id(part): part for part in module.modules()}
    owners |= {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    saved = [
        (owner, name) for owner in owners.values() for name in SWITCHES if getattr(owner, name, None) is True
    ]
    for owner, name in saved:
        setattr(owner, name, False)
    try:
        yield
    finally:
        for owner, name in saved:
            setattr(owner, name, True)
