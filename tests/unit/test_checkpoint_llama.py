# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The mapping from Hugging Face's names and layouts to megatron-core's, against slow references."""

import pytest
import torch

from nemo_ee.checkpoint.conversion import llama
from nemo_ee.errors import CheckpointError
from tests.support import tiny_llama


@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 4, 2), (4, 2, 2), (9, 3, 4), (4, 1, 3)])
@pytest.mark.parametrize("trailing", [(5,), ()], ids=["weight", "bias"])
def test_qkv_is_interleaved_by_group(heads, groups, size, trailing):
    q, k, v = (torch.randn(n * size, *trailing) for n in (heads, groups, groups))
    rows = []
    per_group = heads // groups
    for group in range(groups):
        for head in range(group * per_group, (group + 1) * per_group):
            rows += list(q[head * size : (head + 1) * size])
        rows += list(k[group * size : (group + 1) * size])
        rows += list(v[group * size : (group + 1) * size])
    assert torch.equal(llama.interleave_qkv(q, k, v, groups, size), torch.stack(rows))


def test_every_weight_is_mapped_once_and_padding_is_zero():
    config = tiny_llama.config(tie_word_embeddings=False)
    weights = dict(tiny_llama.model(config).state_dict())
    elements = sum(value.numel() for value in weights.values())
    gate, up = (weights[f"model.layers.3.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    mapped = llama.to_megatron(weights, config, 128)
    assert not weights, "consumed"
    assert sum(value.numel() for value in mapped.values()) == elements + 2 * 28 * 32
    assert torch.equal(mapped["decoder.layers.3.mlp.linear_fc1.weight"], torch.cat((gate, up)))
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert mapped[key].shape == (128, 32) and not mapped[key][100:].any()


def test_tied_models_have_no_output_layer():
    config = tiny_llama.config()
    mapped = llama.to_megatron(dict(tiny_llama.model(config).state_dict()), config, 128)
    assert "output_layer.weight" not in mapped


def test_missing_and_surplus_weights_are_named():
    config = tiny_llama.config()
    weights = dict(tiny_llama.model(config).state_dict())
    weights.pop("model.layers.1.self_attn.k_proj.weight")
    with pytest.raises(CheckpointError, match="model.layers.1.self_attn.k_proj.weight"):
        llama.to_megatron(weights, config, 128)
    weights = dict(tiny_llama.model(config).state_dict()) | {"model.vision.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match="model.vision.weight"):
        llama.to_megatron(weights, config, 128)


@pytest.mark.parametrize(
    ("tokens", "rows", "padded"),
    [
        (100, 100, 128),
        (49152, 49152, 49152),
        (100, 300, 512),
        (151665, 151936, 152064),
        (32000, 32000, 32000),
        (101, 100, 128),
    ],
)
def test_padded_vocabulary_holds_every_row(tokens, rows, padded):
    divisor = llama.vocabulary_divisor(tokens, rows)
    assert divisor % 128 == 0
    assert -(-tokens // divisor) * divisor == padded >= rows


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling=dynamic"),
        ({"architectures": ["GemmaForCausalLM"]}, "architectures=GemmaForCausalLM"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 16}, "sliding_window=16"),
    ],
)
def test_unsupported_models_are_refused(changes, words):
    base = {"architectures": ["LlamaForCausalLM"]}
    llama.check_supported(tiny_llama.config(**base))
    with pytest.raises(CheckpointError, match=words):
        llama.check_supported(tiny_llama.config(**{**base, **changes}))


def test_all_faults_are_listed():
    config = tiny_llama.config(architectures=["LlamaForCausalLM"], hidden_act="gelu", mlp_bias=True)
    with pytest.raises(CheckpointError) as error:
        llama.check_supported(config)
    assert len(str(error.value).splitlines()) == 2


def test_configuration_follows_the_model():
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = tiny_llama.config(rms_norm_eps=3e-6, rope_theta=5e5, rope_scaling=scaling, head_dim=16)
    derived = llama.nemo_config(config, tokens=100, precision="bf16")
    expected = {
        "num_layers": 4,
        "kv_channels": 16,
        "num_query_groups": 2,
        "layernorm_epsilon": 3e-6,
        "rotary_base": 5e5,
        "scale_positional_embedding": True,
        "scale_factor": 32.0,
        "old_context_len": 8192,
        "encoder_seq_length": 64,
        "share_embeddings_and_output_weights": True,
        "precision": "bf16",
        "qkv_bias": False,
    }
    assert {key: derived[key] for key in expected} == expected
