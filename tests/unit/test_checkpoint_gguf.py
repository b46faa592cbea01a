# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""GGUF files: Hugging Face's logits from their keys and tensors, and everything else in them refused by name."""

import shlex
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nemo_ee.checkpoint import gguf
from nemo_ee.checkpoint.gguf import keys, rope
from nemo_ee.errors import CheckpointError
from tests.support import hostile_weights, tiny_gguf, tiny_llama

LLAMA3 = tiny_llama.LLAMA3_SCALING
VARIANTS = {
    "plain": {},
    "untied": {"tie_word_embeddings": False, "rope_theta": 5e5},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "llama3-wide-heads": {"rope_scaling": {**LLAMA3, "factor": 32.0}, "head_dim": 16, "rope_theta": 5e5},
    "one-group": {"num_key_value_heads": 1},
}


@torch.no_grad()
def gap(file: gguf.GGUFFile, network) -> float:
    """Largest difference of logits between a network and what its file makes."""
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_config(file.config, torch_dtype=torch.float32).eval()
    report = again.load_state_dict(file.load_weights(), strict=False)
    assert not report.unexpected_keys and set(report.missing_keys) <= {"lm_head.weight"}
    ids = tiny_llama.prompts(length=48)
    return (again(ids).logits - network(ids).logits).abs().max().item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_network_that_was_written(tmp_path, variant):
    network = tiny_llama.model(tiny_gguf.config(**VARIANTS[variant]))
    file = gguf.inspect(tiny_gguf.write(tmp_path / "m.gguf", network))
    assert gap(file, network) < 1e-5
    assert (file.config.rms_norm_eps, file.config.rope_theta) == (1e-5, network.config.rope_theta)
    if VARIANTS[variant].get("rope_scaling"):
        unscaled = tiny_llama.model(tiny_gguf.config(**{**VARIANTS[variant], "rope_scaling": None}))
        unscaled.load_state_dict(network.state_dict())
        assert gap(file, unscaled) > 0.1, "the scaling is of consequence here"


def test_qwen2_keeps_its_biases_and_its_order_of_dimensions(tmp_path):
    from transformers import Qwen2Config

    settings = tiny_gguf.config().to_dict()
    for key in ("model_type", "architectures", "attention_bias", "mlp_bias", "head_dim"):
        settings.pop(key, None)
    network = tiny_llama.model(Qwen2Config(**settings, use_sliding_window=False))
    path = tiny_gguf.write(tmp_path / "m.gguf", network)
    file = gguf.inspect(path)
    assert file.config.architectures == ["Qwen2ForCausalLM"]
    assert gap(file, network) < 1e-5
    tiny_gguf.write(path, network, tensors={"blk.2.attn_k.bias": None})
    with pytest.raises(CheckpointError, match=r"blk\.2\.attn_k\.bias: is missing"):
        gguf.inspect(path)


@pytest.mark.parametrize(
    ("scaling", "factor"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.factor": 4.0}, 4.0),  # llama.cpp: linear where no type is given
        ({"rope.scale_linear": 2.5}, 2.5),  # the key's name before August 2023
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.original_context_length": 16}, None),
    ],
)
def test_linear_scaling_by_llama_cpps_defaults(tmp_path, scaling, factor):
    changed = {f"llama.{key}": value for key, value in scaling.items()}
    file = gguf.inspect(tiny_gguf.write(tmp_path / "m.gguf", keys=changed))
    expected = None if factor is None else {"rope_type": "linear", "factor": factor}
    assert file.config.rope_scaling == expected


# Llama 3.1 8B, 3.2 1B, 3.3 70B; one whose low factor is not 1, one trained at an odd length, one unusual throughout
PUBLISHED = [
    (128, 8.0, 1.0, 4.0, 8192),
    (64, 32.0, 1.0, 4.0, 8192),
    (128, 8.0, 1.0, 4.0, 4096),
    (128, 16.0, 2.0, 8.0, 8192),
    (128, 4.0, 1.0, 3.0, 6000),
    (64, 10.5, 1.3, 5.7, 3333),
]


@pytest.mark.parametrize(("head", "factor", "low", "high", "original"), PUBLISHED)
def test_llama3_settings_are_recovered_from_their_divisors(head, factor, low, high, original):
    given = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    settings = tiny_llama.config(
        hidden_size=head, num_attention_heads=1, num_key_value_heads=1, rope_theta=5e5, rope_scaling=given
    )
    divisors = tiny_gguf.rope_divisors(settings)
    assert divisors.max() > 1.5
    found = rope.scaling({}, "llama", divisors, head, 5e5)
    if low == 1.0:
        assert found == given
    settings.rope_scaling = found
    assert np.allclose(tiny_gguf.rope_divisors(settings), divisors, rtol=1e-5, atol=0)


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as error:
        gguf.inspect(path)
    return str(error.value)


def test_divisors_that_are_not_llama_3s_are_refused(tmp_path):
    for divisors in (np.linspace(1, 4, 4), np.array([1.0, 2.0]), np.array([8.0, 8.0, 1.0, 1.0])):
        path = tiny_gguf.write(
            tmp_path / "m.gguf", tensors={"rope_freqs.weight": divisors.astype(np.float32)}
        )
        assert "rope_freqs.weight: must hold the 4 frequency divisors" in refusal(path)
    ones = {"rope_freqs.weight": np.ones(4, dtype=np.float32)}
    assert gguf.inspect(tiny_gguf.write(tmp_path / "m.gguf", tensors=ones)).config.rope_scaling is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.sliding_window", 16),
        ("llama.expert_count", 8),
        ("llama.attention.value_length", 4),
        ("llama.rope.dimension_count", 4),
        ("llama.attention.causal", False),
        ("llama.logit_scale", 0.0625),
        ("llama.embedding_scale", 12.0),
        ("llama.residual_scale", 0.22),
        ("llama.attention.scale", 0.015625),
        ("llama.attention.clamp_kqv", 8.0),
        ("llama.attn_logit_softcapping", 50.0),
        ("llama.final_logit_softcapping", 30.0),
        ("llama.use_parallel_residual", True),
        ("llama.nextn_predict_layers", 1),
        ("llama.rope.scaling.type", "yarn"),
        ("llama.rope.scaling.type", "longrope"),
        ("llama.rope.scaling.type", "llama3"),
        ("llama.rope.scaling.attn_factor", 1.2),
        ("llama.rope.dimension_sections", [2, 2, 0, 0]),
        ("llama.attention.head_count_kv", [2, 1]),
        ("llama.vocab_size", 100),
        ("llama.something_new", 1),
        ("tokenizer.ggml.pre", "nonsense"),
        ("tokenizer.ggml.model", "t5"),
        ("tokenizer.ggml.add_eos_token", True),
        ("tokenizer.ggml.add_space_prefix", True),
        ("tokenizer.ggml.remove_extra_whitespaces", True),
        ("tokenizer.ggml.precompiled_charsmap", "abc"),
        ("tokenizer.ggml.normalizer.lowercase", True),
        ("tokenizer.ggml.suppress_tokens", [5]),
        ("tokenizer.ggml.eot_token_id", 9999),
        ("tokenizer.rwkv.world", "abc"),
        ("tokenizer.something_new", True),
        ("general.type", "adapter"),
        ("clip.has_vision_encoder", True),
        ("split.count", 3),
        # what no converter writes
        ("llama.block_count", "four"),
        ("llama.rope.freq_base", 0.0),
        ("llama.rope.freq_base", float("nan")),
        ("llama.rope.scaling.factor", float("nan")),
        ("llama.rope.scaling.factor", -2.0),
        ("llama.rope.scaling.factor", "four"),
        ("llama.rope.scaling.type", [1, 2]),
        ("llama.block_count", 2**31),
        ("llama.block_count", 0),
        ("llama.feed_forward_length", 64.5),
        ("llama.attention.head_count_kv", 2**20),
        ("split.count", "many"),
        ("tokenizer.ggml.pre", [1, 2]),
        ("tokenizer.ggml.tokens", [1, 2]),
        ("tokenizer.ggml.merges", [1, 2]),
        ("tokenizer.ggml.token_type", ["a"] * 300),
        ("tokenizer.ggml.add_bos_token", "false"),
        ("tokenizer.ggml.eos_token_id", "</s>"),
        ("tokenizer.chat_template", 3),
        ("tokenizer.chat_template.tool_use", 3),
    ],
)
def test_keys_that_would_be_lost_are_refused_by_name(tmp_path, key, value):
    message = refusal(tiny_gguf.write(tmp_path / "m.gguf", keys={key: value}))
    assert f"{key}={keys.shown(value)}: " in message
    assert len(message.splitlines()) == 1
    assert "; " in message.split(f"{key}=")[1], "the remedy"


@pytest.mark.parametrize(
    "given",
    [
        {"llama.attention.sliding_window": 0, "llama.expert_count": 0, "llama.attention.causal": True},
        {"llama.attention.sliding_window": 4096, "llama.logit_scale": 1.0, "llama.embedding_scale": 0.0},
        {"llama.feed_forward_length": [64], "llama.tensor_data_layout": "Meta AI original pth"},
        {"llama.attention.key_length": None, "llama.attention.value_length": None, "llama.vocab_size": None},
        {"llama.rope.dimension_count": None, "llama.rope.freq_base": None, "general.name": None},
        {"general.whatever": "x", "general.sampling.temp": 0.6, "mradermacher.quantized_by": "mradermacher"},
        {"quantize.imatrix.entries_count": 224, "imatrix.chunk_count": 3, "split.count": 1},
        {"tokenizer.ggml.seperator_token_id": 2, "tokenizer.ggml.cls_token_id": 1},
    ],
)
def test_keys_of_no_consequence_and_defaults_pass(tmp_path, given):
    network = tiny_llama.model(tiny_gguf.config(num_hidden_layers=1))
    assert gap(gguf.inspect(tiny_gguf.write(tmp_path / "m.gguf", network, keys=given)), network) < 1e-5


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("blk.0.attn_q.bias", np.zeros(32, dtype=np.float32), "has no place in a plain GPT model"),
        ("blk.0.ffn_gate_inp.weight", np.zeros((4, 32), dtype=np.float32), "has no place"),
        ("rope_factors_long.weight", np.ones(4, dtype=np.float32), "has no place"),
        ("blk.1.attn_norm.weight", np.ones(32, dtype=np.float32), "has no place"),
        ("blk.0.ffn_up.weight", None, "is missing"),
        ("token_embd.weight", None, "is missing"),
        (
            "blk.0.ffn_up.weight",
            np.zeros((60, 32), dtype=np.float32),
            "has shape [60, 32], must have [64, 32]",
        ),
        ("output.weight", np.zeros((100, 32), dtype=np.float32), "has shape [100, 32]"),
    ],
)
def test_tensors_that_would_be_lost_are_refused_by_name(tmp_path, name, value, words):
    message = refusal(tiny_gguf.write(tmp_path / "m.gguf", tensors={name: value}))
    assert f"{name}: {words}" in message and len(message.splitlines()) == 1


def test_the_remedy_against_an_eos_behind_prompts_works(tmp_path, monkeypatch):
    from gguf.scripts import gguf_set_metadata

    path = tiny_gguf.write(tmp_path / "m.gguf", keys={"tokenizer.ggml.add_eos_token": True})
    command = refusal(path).rpartition("set it to False: ")[2]
    arguments = shlex.split(command.replace("FILE.gguf", str(path)))
    monkeypatch.setattr(sys, "argv", arguments)
    gguf_set_metadata.main()
    assert gguf.inspect(path).load_tokenizer()("xyz").tokens() == ["xyz"]


def test_all_faults_are_listed(tmp_path):
    changed = {"llama.expert_count": 8, "tokenizer.ggml.pre": "x", "llama.rope.scaling.type": "yarn"}
    path = tiny_gguf.write(tmp_path / "m.gguf", keys=changed)
    assert len(refusal(path).splitlines()) == 3


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_types(tmp_path, kind):
    from gguf import GGMLQuantizationType, dequantize, quantize

    network = tiny_llama.model(tiny_gguf.config(num_hidden_layers=1))
    weights = gguf.inspect(tiny_gguf.write(tmp_path / "m.gguf", network, quantization=kind)).load_weights()
    original = network.state_dict()["model.layers.0.mlp.up_proj.weight"].numpy()
    type_ = GGMLQuantizationType[kind]
    assert np.array_equal(
        weights["model.layers.0.mlp.up_proj.weight"].numpy(), dequantize(quantize(original, type_), type_)
    )


def test_types_that_cannot_be_dequantised_are_named(tmp_path):
    path = tiny_gguf.write(tmp_path / "m.gguf")
    whole = path.read_bytes()
    name = b"blk.0.ffn_up.weight"
    at = whole.index(name) + len(name) + 4 + 2 * 8  # number of dimensions, their sizes
    for type_, words in ((26, "blk.0.ffn_up.weight: its type I32"), (31, "a tensor's type is unknown")):
        path.write_bytes(whole[:at] + struct.pack("<I", type_) + whole[at + 4 :])
        assert words in refusal(path)


def test_bad_files_give_one_error(tmp_path):
    whole = tiny_gguf.write(tmp_path / "m.gguf").read_bytes()
    bad = tmp_path / "bad.gguf"
    for size in (4, 20, 200, len(whole) // 2, len(whole) - 64):
        bad.write_bytes(whole[:size])
        assert "truncated or damaged" in refusal(bad)
    bad.write_bytes(b"PK\x03\x04" + whole[4:])
    assert "no GGUF file" in refusal(bad)
    network = SimpleNamespace(
        config=tiny_gguf.config(), state_dict=dict
    )  # keys alone: the architecture is read first
    network.config.model_type = "mamba"
    assert "general.architecture=mamba: must be one of llama, qwen2" in refusal(tiny_gguf.write(bad, network))
    for value in (struct.pack("<II", 4, 3), struct.pack("<IIQI", 9, 4, 1, 7)):  # a number, and a list
        bad.write_bytes(hostile_weights.gguf(1, 0, hostile_weights._text(b"general.architecture") + value))
        assert f"{bad}: general.architecture=" in refusal(bad)


def test_bytes_in_another_order_are_refused_with_a_remedy_that_works(tmp_path, monkeypatch):
    from gguf.scripts import gguf_convert_endian

    network = tiny_llama.model(tiny_gguf.config(num_hidden_layers=1))
    path = tiny_gguf.write(tmp_path / "m.gguf", network, big_endian=True)
    command = refusal(path).rpartition("swap them: ")[2]
    monkeypatch.setattr(sys, "argv", shlex.split(command.replace("FILE.gguf", str(path))))
    monkeypatch.setattr("builtins.input", lambda _: "YES")
    gguf_convert_endian.main()
    assert gap(gguf.inspect(path), network) < 1e-5
