# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""`TorchAttention` against the plainest softmax attention, in float64, forward and backward."""

import dataclasses
import math

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from tests.support.tiny_gpt import tiny_model, tiny_model_config

BATCH, HEADS, SIZE = 3, 4, 8


@pytest.fixture(scope="module")
def config():
    config = tiny_model(tiny_model_config()).gpt.config
    return dataclasses.replace(
        config, num_attention_heads=HEADS, hidden_size=HEADS * SIZE, num_query_groups=2
    )


def naive(query, key, value, visible, scale):
    """Query by query; `visible` [B, heads, Sq, Sk]."""
    rows = []
    repeat = query.shape[2] // key.shape[2]
    for i in range(query.shape[0]):
        per_sequence = []
        for b in range(query.shape[1]):
            per_head = []
            for h in range(query.shape[2]):
                seen = visible[b, h, i].nonzero()[:, 0]
                scores = key[seen, b, h // repeat] @ query[i, b, h] * scale
                per_head.append(scores.softmax(0) @ value[seen, b, h // repeat])
            per_sequence.append(torch.cat(per_head))
        rows.append(torch.stack(per_sequence))
    return torch.stack(rows)


def padding(queries: int, keys: int) -> torch.Tensor:
    """True hides: the first row sees all keys, the others lose their first ones (left padding)."""
    hidden = torch.zeros(BATCH, 1, queries, keys, dtype=torch.bool)
    for b in range(BATCH):
        hidden[b, :, :, :b] = True
    return hidden


CASES = {
    "causal": (6, 6, AttnMaskType.causal, None),
    "causal and a causal mask": (6, 6, AttnMaskType.causal, torch.ones(6, 6).triu(1).bool()[None, None]),
    "padded": (6, 6, AttnMaskType.padding, padding(6, 6)),
    "everything visible": (6, 6, AttnMaskType.no_mask, None),
    "cached, one query": (1, 7, AttnMaskType.no_mask, None),
    "cached, one causal query": (1, 7, AttnMaskType.causal, None),
    "cached, several queries": (3, 7, AttnMaskType.causal, None),
    "cached and padded": (3, 7, AttnMaskType.causal, padding(3, 7)),
    "cached, one padded query": (1, 7, AttnMaskType.causal, padding(1, 7)),
    "first token": (1, 1, AttnMaskType.causal, None),
}


def visible_keys(queries, keys, mask_type, mask):
    """As the documentation of `forward` says: queries are the last positions, True hides."""
    visible = torch.ones(BATCH, HEADS, queries, keys, dtype=torch.bool)
    for i in range(queries):
        for j in range(keys):
            if mask_type == AttnMaskType.causal and j > i + keys - queries:
                visible[:, :, i, j] = False
    return visible if mask is None else visible & ~mask


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("case", CASES)
def test_against_naive_softmax(config, case, groups):
    from nemo_ee.modeling.attention import TorchAttention

    queries, keys, mask_type, mask = CASES[case]
    torch.manual_seed(len(case))
    shapes = ((queries, HEADS), (keys, groups), (keys, groups))
    inputs = [
        torch.randn(n, BATCH, heads, SIZE, dtype=torch.float64, requires_grad=True) for n, heads in shapes
    ]
    attention = TorchAttention(config, 1, AttnMaskType.causal)
    found = attention(*inputs, attention_mask=mask, attn_mask_type=mask_type)
    visible = visible_keys(queries, keys, mask_type, mask)
    expected = naive(*inputs, visible, 1 / math.sqrt(SIZE))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(expected)
    for mine, reference in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)


def test_layer_decides_where_the_call_does_not(config):
    from nemo_ee.modeling.attention import TorchAttention

    torch.manual_seed(0)
    q, k, v = (torch.randn(4, BATCH, HEADS, SIZE) for _ in range(3))
    causal = TorchAttention(config, 1, AttnMaskType.causal)(q, k, v)
    open_ = TorchAttention(config, 1, AttnMaskType.no_mask)(q, k, v)
    assert not torch.allclose(causal[0], open_[0])
    torch.testing.assert_close(causal[-1], open_[-1])


def test_softmax_scale(config):
    from nemo_ee.modeling.attention import TorchAttention

    torch.manual_seed(0)
    q, k, v = (torch.randn(4, BATCH, HEADS, SIZE, dtype=torch.float64) for _ in range(3))
    visible = visible_keys(4, 4, AttnMaskType.causal, None)
    found = TorchAttention(config, 1, AttnMaskType.causal, softmax_scale=0.7)(q, k, v)
    torch.testing.assert_close(found, naive(q, k, v, visible, 0.7))


def test_what_needs_transformer_engine_is_refused(config):
    from nemo_ee.modeling.attention import TorchAttention

    q = torch.randn(2, BATCH, HEADS, SIZE)
    attention = TorchAttention(config, 1, AttnMaskType.causal)
    with pytest.raises(NotImplementedError, match="attention biases"):
        attention(q, q, q, attention_bias=torch.zeros(1))
    config.context_parallel_size = 2
    try:
        with pytest.raises(NotImplementedError, match="context_parallel_size=2"):
            TorchAttention(config, 1, AttnMaskType.causal)
    finally:
        config.context_parallel_size = 1
    config.window_size = (2, 0)
    try:
        with pytest.raises(NotImplementedError, match=r"window_size=\(2, 0\).*set it to null"):
            TorchAttention(config, 1, AttnMaskType.causal)
    finally:
        config.window_size = None
