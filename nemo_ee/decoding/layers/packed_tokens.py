# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Tokens of several sequences at different positions, packed one after the other, as cached layers take them.

Every sequence has a row of the caches. Suffixes: T packed tokens, N sequences in the pack, Q most tokens of
one sequence in the pack, L keys looked at, G query groups and R queries per group, D head size.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from nemo_ee.decoding.transfer import to_device
from nemo_ee.modeling.gpt import EarlyExitGPTModel

T = TypeVar("T")

PADDING = 500
"""Query-key pairs of padding, per sequence, that take about as long as a call of attention (SmolLM2 on two cores)."""


class PositionTable:
    """Positions 0..max_length-1 and their rotary factors, looked up by every pack of one decoder.

    Args:
        max_length: positions.
        device: where they are.
    """

    def __init__(self, max_length: int, device: torch.device):
        self.positions = torch.arange(max_length, device=device)
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None
        self._rotations: dict[tuple[torch.dtype, bool], tuple[np.ndarray, ...]] = {}

    @classmethod
    def of(
        cls, gpt: EarlyExitGPTModel, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> "PositionTable":
        """With the rotary factors of a model, if it has such.

        Args:
            gpt: the model; its position embedding is rotary, learned or none.
            max_length: positions.
            dtype: of queries and keys.
            device: where they are.

        Raises:
            NotImplementedError: for position embeddings that need more than a position per token.
        """
        table = cls(max_length, device)
        kind = gpt.position_embedding_type
        if kind not in ("rope", "learned_absolute", "none"):
            raise NotImplementedError(
                f"position_embedding_type={kind}: decoding knows rope, learned_absolute and none"
            )
        if kind == "rope":
            # The module caches what it returns; a cached inference tensor would break the next training step.
            with torch.inference_mode(False), torch.no_grad():
                angles = gpt.rotary_pos_emb(max_length).to(device)
            table.cos = angles.cos().to(dtype)
            table.sin = signed(angles.sin(), gpt.config.rotary_interleaved).to(dtype)
        return table

    def rotation(self, dtype: torch.dtype, rotary: bool) -> tuple[np.ndarray, ...]:
        """Cosines and signed sines as CPU kernels read them, [L, features that rotate]; [0, 0] if nothing does."""
        if (dtype, rotary) not in self._rotations:
            parts = [self.cos, self.sin]
            if not rotary or self.cos is None:
                parts = [self.positions.new_empty(0, 0)] * 2
            self._rotations[dtype, rotary] = tuple(part.flatten(1).to(dtype).numpy() for part in parts)
        return self._rotations[dtype, rotary]


def signed(sin: Tensor, interleaved: bool) -> Tensor:
    """Sines with the sign that each factor of a rotated pair has, so that rotating swaps halves and no more."""
    sin = sin.clone()
    if interleaved:
        sin[..., ::2] *= -1
    else:
        sin[..., : sin.shape[-1] // 2] *= -1
    return sin


@dataclass(frozen=True)
class Run:
    """Sequences of a pack in neighbouring rows, with as many new tokens each: their keys are one view.

    Attributes:
        row: the first one's.
        starts: position of each one's first new token.
        count: new tokens of each.
    """

    row: int
    starts: tuple[int, ...]
    count: int

    @property
    def length(self) -> int:
        """Keys of the longest."""
        return max(self.starts) + self.count

    @property
    def padding(self) -> int:
        """Pairs of a query and a key beyond its own that attention in one call has."""
        return self.count * (len(self.starts) * max(self.starts) - sum(self.starts))

    def with_next(self, start: int) -> "Run":
        """One sequence more."""
        return Run(self.row, (*self.starts, start), self.count)

    @classmethod
    def of(cls, rows: list[int], starts: list[int], counts: list[int]) -> list["Run"]:
        """The runs of a pack, in its order: as long as a call saved is worth the padding."""
        runs: list[Run] = []
        for row, start, count in zip(rows, starts, counts, strict=True):
            last = runs[-1] if runs else None
            if last and row == last.row + len(last.starts) and count == last.count:
                longer = last.with_next(start)
                together = count == 1 or (start > 0) == (last.starts[0] > 0)  # prompts have no mask
                if together and longer.padding <= PADDING * len(longer.starts):
                    runs[-1] = longer
                    continue
            runs.append(cls(row, (start,), count))
        return runs


class PackedTokens:
    """New tokens of N sequences, each sequence's contiguous, one after the other along the T axis.

    Args:
        table: shared positions.
        rows: the N sequences' rows of the caches, ascending.
        starts: position of each sequence's first new token; its keys before that are in the cache.
        counts: new tokens per sequence, each at least 1.

    Attributes:
        sequences: N.
        neighbours: no other rows are between theirs.
        spread: on a CPU attention reads the keys of all rows to the pack's last in place, and queries are padded to
            these rows: cheaper than a call per run while texts are short.
        by_run: attention is called per run of sequences.
        runs: of the sequences; none where attention in one call needs no padding.
        positions: [T].
        last: [N] index within T of each sequence's last token, or a slice where that is a view.
    """

    def __init__(self, table: PositionTable, rows: list[int], starts: list[int], counts: list[int]):
        self.rows, self.starts, self.counts = rows, starts, counts
        self.sequences = len(rows)
        self.first_rows = rows[-1] == len(rows) - 1
        self.neighbours = rows[-1] - rows[0] == len(rows) - 1
        self.single = len(rows) == 1
        self.width = max(counts)
        self.length = max(start + count for start, count in zip(starts, counts, strict=True))
        self.from_scratch = max(starts) == 0
        self._sees_all = self.width == 1 and min(starts) + 1 == self.length
        device = table.positions.device
        ragged = device.type == "cpu" and not self.single and (self.width > 1 or not self.first_rows)
        self.runs = Run.of(rows, starts, counts) if ragged or self.single else []
        self.spread = ragged and not self.from_scratch and self._padding() <= PADDING * len(self.runs)
        # Else views of the caches, one at a time: copying keys would cost more than the calls.
        self.by_run = self.single or (ragged and not self.spread)
        self.height = rows[-1] + 1 if self.spread else self.sequences
        self.last: Tensor | slice
        if self.single:
            span: Tensor | slice = slice(starts[0], self.length)
            self.positions = table.positions[span]
            self.last = slice(self.width - 1, self.width)
        else:
            layout = self._layout(device)
            self.index = layout[:2, : self.tokens]  # [2, T] rows and positions
            self.token_rows, self.positions = self.index
            self.slots = layout[2, : self.tokens]
            self.row_index, ends = layout[3:, : self.sequences]
            self.last = slice(0, len(rows)) if self.width == 1 else ends
            span = self.positions
        self.table, self._span = table, span

    def last_of(self, some: list[int] | None, device: torch.device) -> Tensor | slice:
        """Where the last tokens of some sequences of the pack are, by index among them; None means all."""
        if some is None:
            return self.last
        index = to_device(some, device)
        return index + self.last.start if isinstance(self.last, slice) else self.last[index]

    @property
    def tokens(self) -> int:
        """T."""
        return sum(self.counts)

    def _layout(self, device: torch.device) -> Tensor:
        """[5, T]: of each token its row, position and place among the padded; of each sequence (the first N) its
        row and last token. In one copy, which does not wait for the device."""
        if self.width == 1:  # slots are rows where they are asked for, and each token is its sequence's last
            layout = np.array([self.rows, self.starts, self.rows, self.rows, range(self.sequences)])
            return torch.from_numpy(layout).to(device, non_blocking=True)
        layout = np.zeros((5, self.tokens), dtype=np.int64)
        layout[:2] = token_rows, positions = self.places
        sequence = np.repeat(np.arange(self.sequences), self.counts)
        offset = positions - np.array(self.starts)[sequence]
        layout[2] = (token_rows if self.spread else sequence) * self.width + offset
        layout[3, : self.sequences] = self.rows
        layout[4, : self.sequences] = np.cumsum(self.counts) - 1
        return to_device(layout, device)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned when this pack was first asked for `key`: all layers need it alike."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    @cached_property
    def _kept(self) -> dict[Hashable, Any]:
        return {}

    @cached_property
    def token_rows(self) -> Tensor:
        """[T] rows of the caches; where the pack has several sequences, they came with the positions."""
        return torch.full_like(self.positions, self.rows[0])

    @cached_property
    def keys_seen(self) -> Tensor:
        """[T] how many keys of its sequence each token sees, its own included, as int32."""
        return (self.positions + 1).int()

    @cached_property
    def is_prompt(self) -> bool:
        """Whether sequences begin here, some with several tokens."""
        return self.from_scratch and self.width > 1

    def write_index(self, target: Tensor) -> None:
        """Writes the tokens' rows and positions to the first T columns of [2, T or more]."""
        if self.single:
            target[0, : self.tokens] = self.rows[0]
            target[1, : self.tokens] = self.positions
        else:
            target[:, : self.tokens] = self.index

    def _padding(self) -> int:
        """Pairs of a query and a key beyond its own that attention in one call, on keys in place, has."""
        ends = [start + count for start, count in zip(self.starts, self.counts, strict=True)]
        own = sum(count * end for count, end in zip(self.counts, ends, strict=True))
        return (self.rows[-1] + 1) * self.width * self.length - own

    @cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """[T] rows of the caches and [T] positions, as CPU kernels read them."""
        if self.single:
            return np.full(self.width, self.rows[0]), np.arange(self.starts[0], self.length)
        counts = np.array(self.counts)
        firsts = np.repeat(np.array(self.starts) - counts.cumsum() + counts, counts)
        return np.repeat(np.array(self.rows), counts), firsts + np.arange(counts.sum())

    def store(self, x: Tensor, hidden: Tensor) -> None:
        """Writes the tokens' states [T, H] to their places in [rows, positions, H]."""
        if self.single:
            hidden[self.rows[0], self.starts[0] : self.length] = x
        else:
            hidden[self.token_rows, self.positions] = x

    def rotate(self, qkv: Tensor, interleaved: bool) -> Tensor:
        """Rotary position embedding of queries and keys, [T, G, R + 2, D]; values stay. Nothing without RoPE."""
        table = self.table
        if table.cos is None:
            return qkv
        size = table.cos.shape[-1]

        def factors() -> tuple[Tensor, Tensor]:
            cos, sin = table.cos[self._span], table.sin[self._span]
            shape = (len(cos), 1, *qkv.shape[2:])
            all_cos, all_sin = qkv.new_ones(shape), qkv.new_zeros(shape)
            all_cos[:, :, :-1, :size] = cos
            all_sin[:, :, :-1, :size] = sin
            return all_cos, all_sin

        cos, sin = self.once(("rotation", qkv.shape[2], qkv.dtype), factors)
        return rotate(qkv, cos, sin, size, interleaved)

    def mask(self, repeats: int, dtype: torch.dtype) -> Tensor | None:
        """[N, 1, R x Q, L] to add to scores, -inf where a key is not visible; None if all are. R is `repeats`."""
        if self._sees_all:
            return None

        def mask() -> Tensor:
            keys = self.table.positions[: self.length]
            visible = keys <= self.pad(self.positions)[:, :, None]
            return additive(visible.repeat(1, repeats, 1)[:, None], dtype)

        return self.once(("mask", repeats, dtype), mask)

    def run_mask(self, run: Run, repeats: int, dtype: torch.dtype) -> Tensor | None:
        """[n, 1, R x count, L] of a run of n sequences, as `mask`."""
        if run.count == 1 and not run.padding:
            return None

        def mask() -> Tensor:
            keys = self.table.positions[: run.length]
            last = to_device(run.starts, keys.device)[:, None] + keys[: run.count]  # [n, count]
            visible = keys <= last[:, :, None]
            return additive(visible.repeat(1, repeats, 1)[:, None], dtype)

        return self.once((run, repeats, dtype), mask)

    def pad(self, packed: Tensor) -> Tensor:
        """[T, ...] -> [N, Q, ...], zeros where a sequence has fewer tokens.

        Where the pack is `spread`, N counts all rows of the caches to the pack's last.
        """
        if self._is_padded:
            return packed.view(self.height, self.width, *packed.shape[1:])
        padded = packed.new_zeros(self.height * self.width, *packed.shape[1:])
        padded[self.slots] = packed
        return padded.view(self.height, self.width, *packed.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """[N, Q, ...] -> [T, ...], the inverse of `pad`."""
        flat = padded.reshape(-1, *padded.shape[2:])
        return flat if self._is_padded else flat[self.slots]

    @property
    def _is_padded(self) -> bool:
        return self.single or (self.width == 1 and not self.spread)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as attention adds it to its scores: 0 where `visible`, -inf elsewhere."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, size: int, interleaved: bool) -> Tensor:
    """Rotary position embedding of the first `size` features of x [T, G, n, D].

    Args:
        x: heads.
        cos: [T, 1, n, D], 1 where nothing rotates.
        sin: [T, 1, n, D], signed (see `signed`), 0 where nothing rotates.
        size: features that rotate.
        interleaved: pairs are neighbours, not halves.
    """
    turned = x[..., :size]
    if interleaved:
        swapped = torch.stack((turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        swapped = torch.cat((second, first), dim=-1)
    if size < x.shape[-1]:
        swapped = torch.cat((swapped, x[..., size:]), dim=-1)
    return torch.addcmul(x * cos, swapped, sin)
