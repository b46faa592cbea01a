# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Packs that only the device knows, so that what layers do with them can be captured once and replayed.

Suffixes: T tokens in the pack, L keys looked at.
"""

from functools import cached_property
from typing import Literal

from torch import Tensor

from nemo_ee.decoding.layers.packed_tokens import PackedTokens, PositionTable

MASK_ALIGNMENT = 16
"""Attention kernels on GPUs copy masks whose number of keys is not a multiple of this."""

RowOrder = Literal["in order", "first", "any"]
"""Which rows of the caches a pack's tokens are of. `in order`: token t is of row t. `first`: all are of row 0. In
both cases keys are read in place. `any`: keys are copied, once per token."""


def static_positions(max_length: int) -> int:
    """Positions to reserve where static packs are used: the last one is spare, for padding to write to.

    No key that is looked at is in it, so what padding writes cannot reach a sequence, not even as 0 times NaN.
    """
    return -(-max_length // MASK_ALIGNMENT) * MASK_ALIGNMENT + 1


def rows_of(packed: PackedTokens) -> RowOrder:
    """Which rows a pack's tokens are of."""
    if packed.width == 1 and packed.first_rows:
        return "in order"
    return "first" if packed.single and packed.first_rows else "any"


class StaticTokens(PackedTokens):
    """T new tokens, several of one sequence perhaps, whose rows and positions are tensors alone.

    Nothing that a layer does with this pack depends on them but through tensors: shapes, addresses and the
    operations themselves are the same whatever they hold, and nothing waits for the device. So the operations
    can be captured in a CUDA graph; before a replay, new rows and positions are copied into `index`. What is
    computed from them (mask, rotary factors) is kept for one pass: every capture makes a pack of its own.

    Every token is a query of its own that sees the keys up to its position. As keys are written before attention
    reads them, tokens of one sequence in one pack see each other just as in a causal prompt.

    Args:
        table: shared positions, all of the caches'.
        index: [2, T] rows of the caches and positions, of integers.
        length: L; no position but that of padding may reach it.
        rows: which rows. Padding may stand for any row but writes where `index` says.
    """

    def __init__(self, table: PositionTable, index: Tensor, length: int, rows: RowOrder):
        tokens = index.shape[1]
        self.length, self.first_rows, self.neighbours = length, rows != "any", False
        self.single = self.by_run = self.spread = self.from_scratch = self._sees_all = False
        self.height, self.width = (1, tokens) if rows == "first" else (tokens, 1)
        self.sequences = self.height
        self.token_rows = self.row_index = index[0]
        self.positions = index[1]
        self.table, self._span = table, self.positions

    @property
    def tokens(self) -> int:
        """T, padding included."""
        return len(self.positions)

    @cached_property
    def is_padding(self) -> Tensor:
        """[T] whether a token stands for none: it is at the spare position."""
        return self.positions == len(self.table.positions) - 1

    @cached_property
    def keys_seen(self) -> Tensor:
        """See `PackedTokens`; one for padding, whichever."""
        return self.positions.masked_fill(self.is_padding, 0).int() + 1

    @property
    def _is_padded(self) -> bool:
        return True
