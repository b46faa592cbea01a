# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What a head computes, module by module, and which rows of a projection stand for which tokens."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.support.tiny_gpt import VOCABULARY, tiny_model, tiny_model_config

COMBINATIONS = [
    dict(block=block, mlp=mlp, norm=norm, linear=linear)
    for block, norm, linear in itertools.product([False, True], repeat=3)
    for mlp in ("none", "beside" if linear else "residual")
]


def build(head: dict, exits=(3,), **overrides):
    config = tiny_model_config(exits=list(exits), head={"projection": "tied", **head}, **overrides)
    return tiny_model(config, dtype=torch.float64).gpt


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


def states_of(gpt):
    ids = tokens()
    with torch.no_grad():
        return gpt.forward_states(ids, torch.arange(ids.shape[1]).expand_as(ids), None)


def rms_norm(x, norm):
    return x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def mlp(x, module):
    """MLP(norm(x)) of a gated MLP without biases."""
    gate, up = (rms_norm(x, module.norm) @ module.mlp.linear_fc1.weight.T).chunk(2, -1)
    return (F.silu(gate) * up) @ module.mlp.linear_fc2.weight.T


@torch.no_grad()
@pytest.mark.parametrize("modules", COMBINATIONS, ids=lambda m: "+".join(f"{k}={v}" for k, v in m.items()))
def test_composition(modules):
    gpt = build(modules)
    head, states = gpt.exits["3"], states_of(gpt)
    found = head(states.exits[3], None, states.rotary_pos_emb)
    x = states.exits[3]
    if modules["block"]:
        x, _ = head.block(x, attention_mask=None, rotary_pos_emb=states.rotary_pos_emb)
        assert not torch.allclose(x, states.exits[3])
    branch = mlp(x, head.mlp) if modules["mlp"] != "none" else 0.0
    x = x + branch if modules["mlp"] == "residual" else x
    x = rms_norm(x, head.norm) if modules["norm"] else x
    x = x @ head.linear.weight.T + head.linear.bias if modules["linear"] else x
    expected = x + branch if modules["mlp"] == "beside" else x
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    present = {name for name in ("block", "mlp", "norm", "linear") if getattr(head, name) is not None}
    assert present == {name for name, value in modules.items() if value not in (False, "none")}


@torch.no_grad()
def test_a_block_is_a_layer_of_the_backbone():
    """With the weights of layer 4, the block of the exit at 3 gives what layer 4 gives."""
    gpt = build(dict(block=True, mlp=False, norm=False, linear=False), exits=(3, 4))
    gpt.exits["3"].block.load_state_dict(gpt.decoder.layers[3].state_dict())
    states = states_of(gpt)
    found = gpt.exits["3"](states.exits[3], None, states.rotary_pos_emb)
    torch.testing.assert_close(found, states.exits[4], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_block_sees_the_attention_mask():
    gpt = build(dict(block=True, mlp=False, norm=False, linear=False))
    states = states_of(gpt)
    length = states.exits[3].shape[0]
    causal = torch.ones(length, length).triu(1).bool()[None, None]
    narrow = causal | torch.ones(length, length).tril(-3).bool()[None, None]
    plain, same, other = (
        gpt.exits["3"](states.exits[3], mask, states.rotary_pos_emb) for mask in (None, causal, narrow)
    )
    torch.testing.assert_close(plain, same)
    torch.testing.assert_close(plain[:3], other[:3])
    assert not torch.allclose(plain[3:], other[3:])


@torch.no_grad()
def test_exits_do_not_change_the_model():
    """The forward pass of the model with exits is the plain model's, captured or not."""
    plain = build({}, exits=(8,))
    rich = build(dict(block=True, linear=True, projection="untied"), exits=(1, 2, 3, 4, 5, 6, 7, 8))
    ids = tokens()
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    torch.testing.assert_close(rich(ids, positions, None), plain(ids, positions, None), rtol=0, atol=0)
    states = states_of(rich)
    logits = (states.output @ rich.output_weight().T).transpose(0, 1)
    torch.testing.assert_close(logits, rich(ids, positions, None))


def test_what_is_trained():
    frozen = build(dict(projection="untied")).exits["3"].projection
    assert not frozen.weight.requires_grad
    trained = build(dict(projection="untied", train_projection=True)).exits["3"].projection
    assert trained.weight.requires_grad and trained.bucket_weight is None
    assert list(build({}).exits["3"].projection.parameters()) == []
    shortlist = build(dict(projection="shortlist", shortlist_size=10)).exits["3"].projection
    assert not shortlist.weight.requires_grad
    assert shortlist.bucket_weight.requires_grad and shortlist.bucket_bias.requires_grad


@pytest.fixture(scope="module")
def shortlist():
    projection = build(dict(projection="shortlist", shortlist_size=4)).exits["3"].projection
    projection.set_shortlist(torch.tensor([90, 7, 200, 8]))
    return projection


def test_rows_and_tokens(shortlist):
    from nemo_ee.modeling.projection import BUCKET

    assert shortlist.num_rows == 4 and shortlist.columns == 5 and shortlist.num_kept == 4
    assert shortlist.rows_of(torch.tensor([[7, 8], [90, 200]])).tolist() == [[0, 1], [2, 3]]
    assert shortlist.rows_of(torch.tensor([0, 9, 199])).tolist() == [4, 4, 4]
    assert shortlist.tokens_of(torch.tensor([3, 0, 4])).tolist() == [200, 7, BUCKET]


@torch.no_grad()
def test_logits_of_a_shortlist(shortlist):
    state = torch.randn(6, 64, dtype=torch.float64)
    logits = shortlist.local_logits(state)
    torch.testing.assert_close(logits[:, :4], state @ shortlist.weight.T)
    torch.testing.assert_close(
        logits[:, 4], state @ shortlist.bucket_weight + shortlist.bucket_bias.squeeze()
    )


def test_a_loaded_shortlist_is_in_use(shortlist):
    other = build(dict(projection="shortlist", shortlist_size=4)).exits["3"].projection
    assert other.rows_of(torch.tensor([90])).item() == 4
    other.load_state_dict(shortlist.state_dict())
    assert other.rows_of(torch.tensor([90])).item() == 2
    assert other.tokens_of(torch.tensor([2])).item() == 90


@torch.no_grad()
@pytest.mark.parametrize("projection", ["tied", "untied"])
def test_padding_of_the_vocabulary_never_counts(projection):
    gpt = build(dict(projection=projection), make_vocab_size_divisible_by=64)
    head = gpt.exits["3"].projection
    logits = head.local_logits(torch.randn(3, 64, dtype=torch.float64), gpt.output_weight())
    assert logits.shape[-1] == 256
    assert torch.isfinite(logits[:, :VOCABULARY]).all()
    assert (logits[:, VOCABULARY:] == float("-inf")).all()


@torch.no_grad()
@pytest.mark.parametrize("normalization", ["rmsnorm", "layernorm", "layernorm1p"])
def test_what_the_closed_form_starts_from(normalization):
    """The block is the identity, the norm has neither gain nor bias."""
    gpt = build(
        dict(block=True, mlp=False, linear=False), normalization=normalization, bias=True, activation="gelu"
    )
    gpt.exits["3"].reset_for_fit()
    states = states_of(gpt)
    x = states.exits[3]
    found = gpt.exits["3"](x, None, states.rotary_pos_emb)
    if normalization == "rmsnorm":
        expected = F.rms_norm(x, (64,), eps=1e-5)
    else:
        expected = F.layer_norm(x, (64,), eps=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
