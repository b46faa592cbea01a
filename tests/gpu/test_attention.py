# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""`TorchAttention` on a real GPU, whichever kernels torch chooses there, against the plainest softmax on the CPU."""

import dataclasses

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from tests.support.tiny_gpt import tiny_model, tiny_model_config
from tests.unit.test_attention import naive

pytestmark = pytest.mark.gpu

BATCH, HEADS, GROUPS, SIZE, KEYS = 2, 4, 2, 64, 24
# Relative to the largest value: a few units of the last place, since sums and probabilities are kept in float32.
PRECISIONS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(scope="module")
def config():
    made = tiny_model(tiny_model_config()).gpt.config
    return dataclasses.replace(
        made, num_attention_heads=HEADS, hidden_size=HEADS * SIZE, kv_channels=SIZE, num_query_groups=GROUPS
    )


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("queries", [KEYS, 3, 1])
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_against_the_plainest_softmax(config, dtype, queries, padded):
    from nemo_ee.modeling.attention import TorchAttention

    torch.manual_seed(queries)
    shapes = ((queries, HEADS), (KEYS, GROUPS), (KEYS, GROUPS))
    inputs = [torch.randn(n, BATCH, heads, SIZE).to(dtype) for n, heads in shapes]
    mine = [each.cuda().requires_grad_() for each in inputs]
    wide = [each.double().requires_grad_() for each in inputs]
    hidden = torch.zeros(BATCH, 1, queries, KEYS, dtype=torch.bool)
    if padded:
        hidden[1, ..., 3:8] = True
    later = torch.ones(queries, KEYS).triu(1 + KEYS - queries).bool()
    visible = ~(hidden | later).expand(BATCH, HEADS, -1, -1)
    attention = TorchAttention(config, 1, AttnMaskType.causal)
    mask = hidden.cuda() if padded else None
    found = attention(*mine, attention_mask=mask, attn_mask_type=AttnMaskType.causal)
    expected = naive(*wide, visible, SIZE**-0.5)
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad((found * weights.to(dtype).cuda()).sum(), mine)
    references = torch.autograd.grad((expected * weights.to(dtype).double()).sum(), wide)
    for ours, reference in zip((found, *gradients), (expected, *references), strict=True):
        assert ours.dtype == dtype
        difference = (ours.detach().cpu().double() - reference).abs().max()
        assert difference <= PRECISIONS[dtype] * reference.abs().max()
