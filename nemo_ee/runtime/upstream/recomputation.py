# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""megatron-core's full recomputation of activations, cut into pieces at given layers."""

import copy
from collections.abc import Callable, Iterator

from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor


def checkpoint_with(block: TransformerBlock, forward: Callable[..., Tensor]) -> None:
    """Has a block that recomputes all of its layers call `forward` for that, with what its own method is called with.

    megatron-core (0.13.1, `TransformerBlock.forward`) has no hook between the layers that it recomputes together.
    """
    block._checkpointed_forward = forward


def recompute_in_pieces(
    block: TransformerBlock, cuts: set[int]
) -> Iterator[tuple[int, Callable[..., Tensor]]]:
    """Yields the block's checkpointed forward as consecutive pieces: (layers run so far, the piece).

    Args:
        block: a stage's layers; its configuration says which method recomputes how many layers.
        cuts: numbers of layers (1 to all of the stage's) after which a piece ends.
    """
    config, count = block.config, len(block.layers)
    ends = {*cuts, count}
    if config.recompute_method == "uniform":
        ends |= set(range(config.recompute_num_layers, count, config.recompute_num_layers))
    start = 0
    for end in sorted(ends):
        piece_config = copy.copy(config)
        size = end - start
        if config.recompute_method == "uniform":
            piece_config.recompute_num_layers = size
        else:  # the first `recompute_num_layers` of the stage are recomputed
            piece_config.recompute_num_layers = min(max(config.recompute_num_layers - start, 0), size)
        yield end, _Piece(block, piece_config, start, end)
        start = end


class _Piece:
    """Some consecutive layers of a block, for its own `_checkpointed_forward`."""

    def __init__(self, block: TransformerBlock, config: object, start: int, end: int):
        self.block, self.config = block, config
        self.layers = block.layers[start:end]
        self.num_layers_per_pipeline_rank = end - start

    def __getattr__(self, name: str) -> object:
        return getattr(self.block, name)

    def _get_layer(self, index: int) -> object:
        return self.layers[index]

    def __call__(self, **kwargs) -> Tensor:
        return TransformerBlock._checkpointed_forward(self, **kwargs)
