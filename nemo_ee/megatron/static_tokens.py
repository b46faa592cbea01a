# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Packs that only the device knows, so that what layers do with them can be captured once and replayed.

Suffixes: N sequences in the pack, L keys looked at.
"""

import torch
from torch import Tensor

from nemo_ee.megatron.decode import PackedTokens, PositionTable

MASK_ALIGNMENT = 16
"""Attention kernels on GPUs copy masks whose number of keys is not a multiple of this."""


def static_positions(max_length: int) -> int:
    """Positions to reserve where static packs are used: the last one is spare, for padding to write to.

    No key that is looked at is in it, so what padding writes cannot reach a sequence, not even as 0 times NaN.
    """
    return -(-max_length // MASK_ALIGNMENT) * MASK_ALIGNMENT + 1


class StaticTokens(PackedTokens):
    """One new token of each of N sequences, whose rows and positions are tensors alone.

    Nothing that a layer does with this pack depends on them but through tensors: shapes, addresses and the
    operations themselves are the same whatever they hold, and nothing waits for the device. So the operations
    can be captured in a CUDA graph; before a replay, new rows and positions are copied into `index`. What is
    computed from them (mask, rotary factors) is kept for one pass: every capture makes a pack of its own.

    Args:
        table: shared positions, all of the caches'.
        index: [2, N] rows of the caches and positions, of integers.
        length: L; no position but that of padding may reach it.
        first_rows: the sequences are in the first rows, in order: their keys are then read in place. Padding
            may stand for any row but writes where `index` says.
    """

    def __init__(self, table: PositionTable, index: Tensor, length: int, first_rows: bool):
        self.sequences, self.width, self.length, self.first_rows = index.shape[1], 1, length, first_rows
        self.single = self.by_run = self.spread = self.from_scratch = self._sees_all = False
        self.height = self.sequences
        self.token_rows = self.row_index = index[0]
        self.positions = index[1]
        self.last = slice(0, self.sequences)
        self._masks: dict[tuple[int, torch.dtype], Tensor] = {}
        self._rotations: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.table, self._span = table, self.positions
