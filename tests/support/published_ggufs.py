# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The keys of GGUF files that people download, as llama.cpp logs them; long lists are left out."""

from typing import Any

GENERAL = {
    "general.type": "model",
    "general.name": "x",
    "general.finetune": "Instruct",
    "general.basename": "x",
    "general.size_label": "1B",
    "general.license": "apache-2.0",
    "general.license.link": "https://huggingface.co/x",
    "general.base_model.count": 1,
    "general.base_model.0.name": "x",
    "general.base_model.0.organization": "x",
    "general.base_model.0.repo_url": "https://huggingface.co/x",
    "general.tags": ["chat"],
    "general.languages": ["en"],
    "general.file_type": 7,
    "general.quantization_version": 2,
}
IMATRIX = {
    "quantize.imatrix.file": "/models_out/x.imatrix",
    "quantize.imatrix.dataset": "/training_dir/calibration_datav3.txt",
    "quantize.imatrix.entries_count": 112,
    "quantize.imatrix.chunks_count": 125,
}
CHAT = {"tokenizer.chat_template": "{{ bos_token }}"}


def published(architecture, model_keys, tokenizer_keys, *more):
    """Keys of a published file; the long lists are left out."""
    own = {f"{architecture}.{key}": value for key, value in model_keys.items()}
    theirs = {f"tokenizer.ggml.{key}": value for key, value in tokenizer_keys.items()}
    merged = {"general.architecture": architecture, **own, **theirs}
    for each in more:
        merged |= each
    return merged


def shape(layers, context, width, inner, heads, groups, base, **more):
    return {
        "block_count": layers,
        "context_length": context,
        "embedding_length": width,
        "feed_forward_length": inner,
        "attention.head_count": heads,
        "attention.head_count_kv": groups,
        "rope.freq_base": base,
        "attention.layer_norm_rms_epsilon": 1e-5,
        **{key.replace("__", "."): value for key, value in more.items()},
    }


HEADS_64 = {"attention__key_length": 64, "attention__value_length": 64, "rope__dimension_count": 64}
FILES: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-3.2-1B-Instruct": (
        published(
            "llama",
            shape(16, 131072, 2048, 8192, 32, 8, 5e5, vocab_size=128256, **HEADS_64),
            {"model": "gpt2", "pre": "llama-bpe", "bos_token_id": 128000, "eos_token_id": 128009},
            GENERAL,
            IMATRIX,
            CHAT,
        ),
        128256,
    ),
    "Mistral-7B-Instruct-v0.3": (
        published(
            "llama",
            shape(32, 32768, 4096, 14336, 32, 8, 1e6, vocab_size=32768, rope__dimension_count=128),
            {
                "model": "llama",
                "pre": "default",
                "bos_token_id": 1,
                "eos_token_id": 2,
                "unknown_token_id": 0,
                "add_bos_token": True,
                "add_eos_token": False,
            },
            GENERAL,
            CHAT,
        ),
        32768,
    ),
    "Qwen2.5-0.5B-Instruct": (
        published(
            "qwen2",
            shape(24, 32768, 896, 4864, 14, 2, 1e6),
            {
                "model": "gpt2",
                "pre": "qwen2",
                "eos_token_id": 151645,
                "padding_token_id": 151643,
                "bos_token_id": 151643,
                "add_bos_token": False,
            },
            GENERAL,
            CHAT,
        ),
        151936,
    ),
    "TinyLlama-1.1B-Chat-v1.0": (
        published(
            "llama",
            shape(22, 2048, 2048, 5632, 32, 4, 1e4, rope__dimension_count=64),
            {
                "model": "llama",
                "merges": ["▁ t"],
                "bos_token_id": 1,
                "eos_token_id": 2,
                "unknown_token_id": 0,
                "padding_token_id": 2,
            },
            {"general.name": "tinyllama_tinyllama-1.1b-chat-v1.0", "general.quantization_version": 2},
            CHAT,
        ),
        32000,
    ),
    "SmolLM2-360M-Instruct": (
        published(
            "llama",
            shape(32, 8192, 960, 2560, 15, 5, 1e5, vocab_size=49152, rope__dimension_count=64),
            {
                "model": "gpt2",
                "pre": "smollm",
                "bos_token_id": 1,
                "eos_token_id": 2,
                "unknown_token_id": 0,
                "padding_token_id": 2,
                "add_space_prefix": False,
                "add_bos_token": False,
            },
            GENERAL,
            IMATRIX,
            CHAT,
        ),
        49152,
    ),
    "Mistral-Nemo-Instruct-2407": (
        published(
            "llama",
            shape(
                40,
                1024000,
                5120,
                14336,
                32,
                8,
                1e6,
                vocab_size=131072,
                attention__key_length=128,
                attention__value_length=128,
                rope__dimension_count=128,
            ),
            {
                "model": "gpt2",
                "pre": "tekken",
                "bos_token_id": 1,
                "eos_token_id": 2,
                "unknown_token_id": 0,
                "padding_token_id": 10,
                "add_bos_token": True,
                "add_eos_token": False,
                "add_space_prefix": False,
            },
            GENERAL,
            CHAT,
        ),
        131072,
    ),
    "deepseek-coder-1.3b-instruct": (
        published(
            "llama",
            shape(
                24, 16384, 2048, 5504, 16, 16, 1e5, rope__scaling__type="linear", rope__scaling__factor=4.0
            ),
            {
                "model": "gpt2",
                "pre": "deepseek-coder",
                "bos_token_id": 32013,
                "eos_token_id": 32021,
                "padding_token_id": 32014,
                "add_bos_token": True,
                "add_eos_token": False,
            },
            GENERAL,
        ),
        32256,
    ),
}
"""By name: the keys as llama.cpp's loader lists them, and the rows of the embedding."""
