# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The keys of GGUF files that people download pass, or are refused for what makes the model another one."""

from types import SimpleNamespace

import pytest

from nemo_ee.checkpoint.gguf import keys, model
from nemo_ee.checkpoint.gguf.pre_tokenizers import RULES
from nemo_ee.errors import CheckpointError
from tests.support.published_ggufs import FILES


def tensors(values, embedding):
    """One of each layer, and the embedding: more are not asked for their shapes."""
    layers = range(values[f"{values['general.architecture']}.block_count"])
    return {f"blk.{n}.attn_norm.weight": None for n in layers} | {model.EMBEDDING: embedding}


@pytest.mark.parametrize("name", FILES)
def test_keys_of_published_files_pass(name):
    values, rows = FILES[name]
    assert list(keys.faults(values, values["general.architecture"])) == []
    embedding = SimpleNamespace(shape=(values[f"{values['general.architecture']}.embedding_length"], rows))
    config = model.config(values, {model.OUTPUT: embedding} | tensors(values, embedding))
    heads = 128 if name == "Mistral-Nemo-Instruct-2407" else config.hidden_size // config.num_attention_heads
    assert (config.head_dim, config.vocab_size, config.rms_norm_eps) == (heads, rows, 1e-5)
    expected = {"rope_type": "linear", "factor": 4.0} if name.startswith("deepseek") else None
    assert config.rope_scaling == expected
    assert values.get("tokenizer.ggml.pre", "default") in RULES


REFUSED = {
    "Mixtral-8x7B": ({"llama.expert_count": 8, "llama.expert_used_count": 2}, "llama.expert_count=8"),
    "granite-3": (
        {"llama.logit_scale": 8.0, "llama.residual_scale": 0.22, "llama.embedding_scale": 12.0},
        "llama.residual_scale=0.22",
    ),
    "Qwen2.5-1M": ({"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0}, "type=yarn"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_published_files_that_cannot_be_converted(name):
    more, words = REFUSED[name]
    values, rows = FILES["Qwen2.5-0.5B-Instruct" if name.startswith("Qwen") else "Mistral-7B-Instruct-v0.3"]
    values = values | more
    architecture = values["general.architecture"]
    embedding = SimpleNamespace(shape=(values[f"{architecture}.embedding_length"], rows))
    found = list(keys.faults(values, architecture))
    try:
        model.config(values, tensors(values, embedding))
    except CheckpointError as error:
        found.append(str(error))
    assert any(words in fault for fault in found)
