# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""GGUF files as llama.cpp's converter writes them, with the writer of the package gguf."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import tiny_llama

PREFIX = "tokenizer.ggml."
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def byte_vocabulary() -> dict[str, Any]:
    """Keys of a byte-level vocabulary: three control tokens, the 256 bytes, and two merges."""
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    tokens = ["<unk>", "<s>", "</s>", *bytes_to_unicode().values(), "xy", "xyz"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["x y", "xy z"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": tiny_llama.CHAT_TEMPLATE,
    }


def vocabulary_of(tokenizer: Any, pre: str, special: tuple[str, ...] = ("<s>", "</s>")) -> dict[str, Any]:
    """Keys of a trained byte-level ``tokenizers.Tokenizer``; ``special`` are its BOS and EOS."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokens.index(special[0]),
        "tokenizer.ggml.eos_token_id": tokens.index(special[1]),
        "tokenizer.ggml.add_bos_token": False,
    }


def vocabulary_in(path: Path) -> dict[str, Any]:
    """Keys of the tokenizer that a GGUF file has."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}


def config(**changes: Any) -> Any:
    """`tiny_llama.config` for the tokens of `byte_vocabulary`."""
    return tiny_llama.config(**{"vocab_size": len(byte_vocabulary()[f"{PREFIX}tokens"]), **changes})


def write(
    path: Path,
    network: Any = None,
    vocabulary: Mapping[str, Any] | None = None,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    quantization: str = "F32",
    big_endian: bool = False,
) -> Path:
    """Writes ``network`` (a one-layer Llama by default) with its tokenizer; returns ``path``.

    Args:
        keys: added or, with None, left out.
        tensors: likewise.
        quantization: of all matrices.
        big_endian: whether bytes are in the order of IBM's machines.
    """
    from gguf import GGMLQuantizationType, GGUFEndian, GGUFWriter, quantize

    if network is None:
        network = tiny_llama.model(config(num_hidden_layers=1))
    architecture = network.config.model_type
    values = {
        **_keys(network.config),
        **(byte_vocabulary() if vocabulary is None else vocabulary),
        **(keys or {}),
    }
    writer = GGUFWriter(path, architecture, endianess=GGUFEndian.BIG if big_endian else GGUFEndian.LITTLE)
    for key, value in values.items():
        if value is not None and key != "general.architecture":
            _put(writer, key, value)
    content = {**_tensors(network), **(tensors or {})}
    for name, value in content.items():
        if value is not None:
            kind = GGMLQuantizationType[quantization if value.ndim > 1 else "F32"]
            writer.add_tensor(name, quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def reloaded(tokenizer: Any, folder: Path) -> Any:
    """Saved and loaded, as every user of a converted file gets it."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder / "saved")
    return AutoTokenizer.from_pretrained(folder / "saved", local_files_only=True)


def rope_divisors(settings: Any) -> np.ndarray:
    """``rope_freqs.weight`` of a configuration: transformers' unscaled by its scaled frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain, _ = ROPE_INIT_FUNCTIONS["default"](settings, "cpu")
    scaled, _ = ROPE_INIT_FUNCTIONS[settings.rope_scaling["rope_type"]](settings, "cpu")
    return (plain / scaled).numpy().astype(np.float32)


def _keys(settings: Any) -> dict[str, Any]:
    head = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    own = {
        "vocab_size": settings.vocab_size,
        "context_length": settings.max_position_embeddings,
        "embedding_length": settings.hidden_size,
        "block_count": settings.num_hidden_layers,
        "feed_forward_length": settings.intermediate_size,
        "attention.head_count": settings.num_attention_heads,
        "attention.head_count_kv": settings.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": settings.rms_norm_eps,
        "rope.dimension_count": head,
        "rope.freq_base": settings.rope_theta,
    }
    scaling = settings.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling["factor"]}
    return {"general.name": "tiny"} | {f"{settings.model_type}.{name}": value for name, value in own.items()}


def _tensors(network: Any) -> dict[str, np.ndarray]:
    """Under llama.cpp's names; architecture llama has pairs of rotary dimensions side by side."""
    settings = network.config
    out = {}
    for name, value in network.state_dict().items():
        stem, kind = name.rsplit(".", 1)
        value = value.float().numpy()
        if stem in TOP:
            if stem == "lm_head" and settings.tie_word_embeddings:
                continue
            out[f"{TOP[stem]}.{kind}"] = value
            continue
        _, _, number, stem = stem.split(".", 3)
        if settings.model_type == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = settings.num_attention_heads if "q_" in stem else settings.num_key_value_heads
            value = value.reshape(heads, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        out[f"blk.{number}.{LAYER[stem]}.{kind}"] = value
    if (settings.rope_scaling or {}).get("rope_type") == "llama3":
        out["rope_freqs.weight"] = rope_divisors(settings)
    return out


def _put(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
