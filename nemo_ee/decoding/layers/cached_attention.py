# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Attention of packed tokens on cached keys: what all ways of computing it share, and the one that runs anywhere.

Suffixes: T packed tokens, N sequences in the pack, Q most tokens of one sequence in the pack, L keys looked at, G query
groups and R queries per group, D head size, P positions of the caches.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nemo_ee.decoding.cuda.static_tokens import RowOrder, rows_of
from nemo_ee.decoding.layers.packed_tokens import PackedTokens, Run

FEWEST_KEYS = 128
"""Keys that a captured pass looks at, at least; more in powers of two."""
Shape = tuple[int, RowOrder]
"""What a captured pass depends on beside its number of tokens: keys looked at, and where they are."""


class CachedAttention(Protocol):
    """Attention on caches that it lays out itself."""

    name: str

    def empty_cache(
        self, rows: int, groups: int, positions: int, size: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Zeros, [2, rows, G, P, D] for keys and values, in the order in memory that suits it."""

    def __call__(self, query: Tensor, cache: Tensor, packed: PackedTokens, scale: float | None) -> Tensor:
        """Each token on its sequence's keys up to its own, which are in the cache.

        Args:
            query: [T, G, R, D].
            cache: see `empty_cache`.
            packed: the tokens.
            scale: of scores; None for D ** -0.5.

        Returns:
            [T, G x R x D]. Of padding (see `StaticTokens`) it may be anything.
        """

    def shape(self, packed: PackedTokens, most_keys: int) -> Shape:
        """The shape in which a pack is captured.

        Args:
            packed: the tokens.
            most_keys: P without the spare position.
        """

    def shapes(self, tokens: int, rows: int, most_keys: int) -> Iterator[Shape]:
        """All that `shape` can be for packs of that many tokens, padding included, in caches of that many rows."""


class MaskedAttention:
    """torch's `scaled_dot_product_attention` with a mask: on any device, in any dtype.

    All sequences of a call look at as many keys. On a GPU, the keys of a part of the rows are copied first.
    """

    name = "torch's scaled_dot_product_attention with a mask"

    def empty_cache(
        self, rows: int, groups: int, positions: int, size: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """See `CachedAttention`; contiguous, as our CPU kernels read it."""
        # Zeros, not garbage: a masked key has weight 0, and 0 times a NaN is a NaN.
        return torch.zeros(2, rows, groups, positions, size, dtype=dtype, device=device)

    def shape(self, packed: PackedTokens, most_keys: int) -> Shape:
        """See `CachedAttention`."""
        return min(max(1 << (packed.length - 1).bit_length(), FEWEST_KEYS), most_keys), rows_of(packed)

    def shapes(self, tokens: int, rows: int, most_keys: int) -> Iterator[Shape]:
        """See `CachedAttention`."""
        for length in sorted({min(FEWEST_KEYS << n, most_keys) for n in range(most_keys.bit_length())}):
            yield length, "any"
            if tokens <= rows:
                yield length, "in order"
            if tokens > 1:
                yield length, "first"

    def __call__(self, query: Tensor, cache: Tensor, packed: PackedTokens, scale: float | None) -> Tensor:
        """See `CachedAttention`."""
        if packed.by_run:
            runs = packed.runs
            if len(runs) == 1:
                return _attend_run(query, cache, runs[0], packed, scale)
            parts = query.split([len(run.starts) * run.count for run in runs])
            return torch.cat(
                [_attend_run(q, cache, run, packed, scale) for q, run in zip(parts, runs, strict=True)]
            )
        keys, values = (_read(part, packed) for part in cache)
        q = packed.pad(query)  # [N, Q, G, R, D]
        sequences, width = q.shape[:2]
        if packed.is_prompt:
            # Padding comes after a sequence's own tokens, so none of these sees it.
            out = _attend_causally(q, keys, values, scale)
        else:
            out = attend_grouped(q, keys, values, packed.mask(query.shape[2], q.dtype), scale)
        return packed.unpad(out.reshape(sequences, width, -1))


def _attend_run(query: Tensor, cache: Tensor, run: Run, packed: PackedTokens, scale: float | None) -> Tensor:
    """Of n neighbouring sequences: [n x count, G, R, D] -> [n x count, G x R x D]."""
    sequences, count = len(run.starts), run.count
    keys, values = cache[:, run.row : run.row + sequences, :, : run.length]
    q = query.view(sequences, count, *query.shape[1:])
    if run.starts[0] == 0 and count > 1:
        out = _attend_causally(q, keys, values, scale)
    else:
        out = attend_grouped(q, keys, values, packed.run_mask(run, query.shape[2], q.dtype), scale)
    return out.reshape(sequences * count, -1)


def _attend_causally(q: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
    """Of texts from their first token: q [N, Q, G, R, D] -> [N, Q, heads, D]."""
    heads = q.flatten(2, 3).transpose(1, 2)
    gqa = q.shape[3] > 1
    return scaled_dot_product_attention(
        heads, keys, values, is_causal=True, scale=scale, enable_gqa=gqa
    ).transpose(1, 2)


def attend_grouped(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """The heads that share keys as one longer query, so that no backend repeats the keys.

    q [N, Q, G, R, D] -> [N, Q, G, R, D].
    """
    sequences, width, groups, repeats, size = q.shape
    q = q.permute(0, 2, 3, 1, 4).reshape(sequences, groups, repeats * width, size)
    out = scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
    return out.view(sequences, groups, repeats, width, size).permute(0, 3, 1, 2, 4)


def _read(cache: Tensor, packed: PackedTokens) -> Tensor:
    """[N, G, L, D]: a view, but for rows with others between them."""
    if packed.first_rows or packed.spread:
        return cache[: packed.height, :, : packed.length]
    if packed.neighbours:
        return cache[packed.rows[0] : packed.rows[-1] + 1, :, : packed.length]
    return cache[:, :, : packed.length][packed.row_index]
