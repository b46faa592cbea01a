# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A random Llama of a few thousand parameters with a tokenizer of its own, as a Hugging Face directory."""

from pathlib import Path
from typing import Any

import torch

WORDS = "the a of and to in is on for with model layer exit token early state cat dog sat ran".split()
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
"""Llama 3.1's way to scale rotary frequencies, at the length of these models."""


def tokenizer(vocab_size: int = 100) -> Any:
    """A word-level fast tokenizer with ``vocab_size`` tokens and a chat template; it adds no BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *WORDS]
    names += [f"w{n}" for n in range(vocab_size - len(names))]
    backend = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE, **SPECIAL)


def config(**changes: Any) -> Any:
    """4 layers, hidden 32, 4 heads in 2 query groups, 100 tokens; ``changes`` override ``LlamaConfig``."""
    from transformers import LlamaConfig

    settings = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "initializer_range": 0.2,
        **changes,
    }
    return LlamaConfig(**settings)


def model(settings: Any, seed: int = 0) -> Any:
    """A Hugging Face model of ``settings`` in eval mode; norms and biases are random too, not 1 and 0."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(settings, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        for name, value in network.named_parameters():
            if "norm" in name:
                value.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                value.normal_(std=0.2)
    return network


def write(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Saves a tiny model with its tokenizer; returns ``directory``."""
    settings = config(**changes)
    model(settings, seed).save_pretrained(directory)
    tokenizer(min(settings.vocab_size, 100)).save_pretrained(directory)
    return directory


def prompts(rows: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Token ids [rows, length] of the tiny tokenizer."""
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(seed))
