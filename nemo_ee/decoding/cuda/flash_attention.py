# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Attention on cached keys by flash attention's kernels: no mask, no copies, and no key behind a sequence's end.

Two calls of well-kept packages, for float16 and bfloat16 on GPUs from compute capability 8.0 on: flash-attn's
`flash_attn_with_kvcache`, which NVIDIA's containers bring along and Megatron's own decoding uses, and torch's own
`varlen_attn` with `seqused_k` (torch 2.13; its block tables need FlashAttention 3, so rows are sequences here, not
pages). Neither has run here: what they are given is tested on a CPU against their documentation, and before a model
uses one on a device, its results there must equal the masked reference's (`chosen_attention`).

With both, keys lie token by token, [rows, positions, groups, head size], and a captured pass depends on its number of
tokens alone. Prompts, whose keys are all their own, are left to torch's causal attention.

Suffixes: as in `nemo_ee.decoding.layers.cached_attention`.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from nemo_ee.decoding.cuda.static_tokens import StaticTokens
from nemo_ee.decoding.layers.cached_attention import CachedAttention, MaskedAttention, Shape
from nemo_ee.decoding.layers.packed_tokens import PackedTokens, PositionTable

LARGEST_HEAD = 256
"""Sizes of heads that flash attention knows: multiples of 8 up to this."""
TOLERANCE = 0.02
"""By which results of order 1 in half precision may differ from the reference."""

MASKED = MaskedAttention()


class FlashAttention(ABC):
    """What both calls share.

    Args:
        call: the package's function.
    """

    name: str

    def __init__(self, call: Callable[..., Tensor]):
        self._call = call

    def empty_cache(
        self, rows: int, groups: int, positions: int, size: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """See `CachedAttention`."""
        return torch.zeros(2, rows, positions, groups, size, dtype=dtype, device=device).transpose(2, 3)

    def shape(self, packed: PackedTokens, most_keys: int) -> Shape:
        """See `CachedAttention`: always the same."""
        return most_keys, "any"

    def shapes(self, tokens: int, rows: int, most_keys: int) -> Iterator[Shape]:
        """See `CachedAttention`."""
        yield most_keys, "any"

    def __call__(self, query: Tensor, cache: Tensor, packed: PackedTokens, scale: float | None) -> Tensor:
        """See `CachedAttention`."""
        if packed.is_prompt:
            return MASKED(query, cache, packed, scale)
        keys, values = cache.transpose(2, 3)  # [rows, P, G, D]
        return self._attend(query.flatten(1, 2), keys, values, packed, scale).flatten(1)

    @abstractmethod
    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, packed: PackedTokens, scale: float | None
    ) -> Tensor:
        """Query [T, G x R, D] on keys and values [rows, P, G, D]; heads G x R, D in the end."""


class KeyValueCacheAttention(FlashAttention):
    """`flash_attn.flash_attn_with_kvcache` (2.x): every token is a sequence of one query, on the cache of its row."""

    name = "flash-attn's flash_attn_with_kvcache"

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, packed: PackedTokens, scale: float | None
    ) -> Tensor:
        lengths, rows = packed.once(self.name, lambda: (packed.keys_seen, packed.token_rows.int()))
        return self._call(
            query[:, None],
            keys,
            values,
            cache_seqlens=lengths,
            cache_batch_idx=rows,
            softmax_scale=scale,
        )[:, 0]


class VariableLengthAttention(FlashAttention):
    """`torch.nn.attention.varlen.varlen_attn`: every row of the caches is a sequence, of no new tokens perhaps."""

    name = "torch's varlen_attn"

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, packed: PackedTokens, scale: float | None
    ) -> Tensor:
        rows, positions = keys.shape[:2]
        new, cached, used = packed.once(self.name, lambda: _sequences(packed, rows, positions))
        return self._call(
            query,
            keys.flatten(0, 1),
            values.flatten(0, 1),
            new,
            cached,
            packed.tokens,
            positions,
            scale=scale,
            window_size=(-1, 0),  # causal: the last query sees all keys in use
            enable_gqa=query.shape[1] != keys.shape[2],
            seqused_k=used,
        )


def _sequences(packed: PackedTokens, rows: int, positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of all rows of the caches, in int32: [rows + 1] where each one's new tokens begin, [rows + 1] where its keys
    begin, and [rows] keys in use, new ones included. From tensors alone, as a captured pass needs it."""
    numbers = torch.arange(rows + 1, dtype=torch.int32, device=packed.positions.device)
    here = packed.token_rows == numbers[:rows, None]  # [rows, T]
    if isinstance(packed, StaticTokens):
        here = here & ~packed.is_padding
    new = torch.zeros_like(numbers)
    new[1:] = here.sum(1).cumsum(0)
    return new, numbers * positions, (here * packed.keys_seen).amax(1).int()


@lru_cache
def chosen_attention(
    device: torch.device, dtype: torch.dtype, groups: int, repeats: int, size: int
) -> tuple[CachedAttention, tuple[str, ...]]:
    """How a model attends to cached keys, and why not otherwise.

    A call is taken only if it has computed a small example on this device as the reference does; this waits for the
    device, once per process.

    Args:
        device: of the model.
        dtype: of its keys.
        groups: G.
        repeats: R.
        size: D.

    Returns:
        The attention, and a sentence per call that was tried in vain.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type != "cuda" or not half or size % 8 or size > LARGEST_HEAD:
        return MASKED, ()
    if torch.cuda.get_device_capability(device) < (8, 0):
        return MASKED, ()
    return first_that_agrees(candidates(), device, dtype, groups, repeats, size)


def candidates() -> Iterator[FlashAttention]:
    """The calls that are installed."""
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        pass
    else:
        yield KeyValueCacheAttention(flash_attn_with_kvcache)
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return
    if "seqused_k" in inspect.signature(varlen_attn).parameters:
        yield VariableLengthAttention(varlen_attn)


def first_that_agrees(
    attentions: Iterable[FlashAttention], device: torch.device, dtype: torch.dtype, *heads: int
) -> tuple[CachedAttention, tuple[str, ...]]:
    """See `chosen_attention`; `heads` are its G, R and D."""
    refused = []
    for attention in attentions:
        try:
            difference = _difference(attention, device, dtype, *heads)
        except Exception as error:  # whatever a package finds wrong
            refused.append(f"{attention.name} failed on {device}: {error}")
            continue
        if difference < TOLERANCE:
            return attention, tuple(refused)
        refused.append(f"{attention.name} differs by {difference:.2g} from {MASKED.name} on {device}")
    return MASKED, tuple(refused)


@torch.no_grad()
def _difference(
    attention: FlashAttention, device: torch.device, dtype: torch.dtype, groups: int, repeats: int, size: int
) -> float:
    """The largest, of a pack with several tokens of a sequence, rows without any, and padding; and of one token."""
    rows, positions = 4, 209
    table = PositionTable(positions, device)
    places = [[0, 2, 2, 2, 3, 0], [5, 97, 98, 99, 207, positions - 1]]  # the last one is padding
    index = torch.tensor(places, device=device)
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(index.shape[1], groups, repeats, size, generator=draw).to(device, dtype)
    cache = attention.empty_cache(rows, groups, positions, size, dtype, device)
    cache.copy_(torch.randn(cache.shape, generator=draw))
    cache[..., -1, :] = torch.nan  # as padding may leave it
    differences = []
    with torch.autocast(device.type, enabled=False):  # it would compute the reference in half precision
        for some in (slice(None), slice(4, 5)):
            packed, reference = (StaticTokens(table, index[:, some], positions - 1, "any") for _ in range(2))
            found = attention(query[some], cache, packed, None)
            expected = MASKED(query[some].float(), cache.float(), reference, None)
            differences.append((found.float() - expected)[~reference.is_padding].abs().max())
    return torch.stack(differences).nan_to_num(torch.inf).max().item()
