# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The tensors of a GGUF file: their names, shapes and types are checked, then they are dequantised one by one."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from nemo_ee.checkpoint.conversion.llama import head_size
from nemo_ee.checkpoint.gguf import model, rope
from nemo_ee.checkpoint.gguf.keys import REMEDY
from nemo_ee.errors import CheckpointError

_TOP = {
    model.EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    model.OUTPUT: "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_IN_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def check(found: Mapping[str, Any], config: Any) -> None:
    """Refuses tensors that are surplus, missing, of another shape, or of a type that cannot be dequantised.

    Args:
        found: the reader's tensors by name.
        config: the model they must make up.

    Raises:
        CheckpointError: every such tensor's name; many of a kind are counted.
    """
    shapes = _shapes(config)
    known = {type_: _readable(type_) for type_ in {each.tensor_type for each in found.values()}}
    kinds: dict[str, list[str]] = {}
    for name, tensor in found.items():
        if name == rope.FREQUENCIES:  # read with the configuration
            if tensor.tensor_type.name != "F32":
                kinds.setdefault(f"must be of type F32; {REMEDY}", []).append(name)
        elif name not in shapes:
            kinds.setdefault(f"has no place in a plain GPT model; {REMEDY}", []).append(name)
        elif (shape := tuple(int(size) for size in reversed(tensor.shape))) != shapes[name]:
            rule = f"has shape {list(shape)}, must have {list(shapes[name])}; download the file again"
            kinds.setdefault(rule, []).append(name)
        elif not known[tensor.tensor_type]:
            rule = (
                f"its type {tensor.tensor_type.name} cannot be dequantised; requantize the model, to Q8_0 say"
            )
            kinds.setdefault(rule, []).append(name)
    missing = [name for name in shapes if name not in found]
    if missing:
        kinds["is missing; download the whole file again"] = missing
    if kinds:
        raise CheckpointError("\n".join(f"{_listed(names)}: {rule}" for rule, names in kinds.items()))


def load(found: Mapping[str, Any], config: Any) -> dict[str, torch.Tensor]:
    """The tensors as a Hugging Face state dict in fp32. Memory for one copy of the model in fp32.

    Args:
        found: the reader's tensors by name, checked, without rotary divisors.
        config: the model.
    """
    from gguf import dequantize

    shapes = _shapes(config)
    weights = {}
    for name, tensor in found.items():
        value = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32).reshape(shapes[name])
        if config.model_type == "llama" and (match := re.search(r"\.attn_([qk])\.", name)):
            heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
            value = _halves(value, heads)
        weights[_theirs(name)] = torch.from_numpy(np.ascontiguousarray(value))
    return weights


def _halves(value: np.ndarray, heads: int) -> np.ndarray:
    """Rotary dimensions in Hugging Face's order, first halves of all pairs first; llama.cpp keeps pairs.

    Source: the inverse of ``LlamaModel.permute`` in llama.cpp's ``convert_hf_to_gguf.py``.
    """
    return value.reshape(heads, -1, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    hidden, inner, head = config.hidden_size, config.intermediate_size, head_size(config)
    queries, groups = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes: dict[str, tuple[int, ...]] = {
        model.EMBEDDING: (config.vocab_size, hidden),
        "output_norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes[model.OUTPUT] = (config.vocab_size, hidden)
    layer = {
        "attn_norm": (hidden,),
        "attn_q": (queries, hidden),
        "attn_k": (groups, hidden),
        "attn_v": (groups, hidden),
        "attn_output": (hidden, queries),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    for number in range(config.num_hidden_layers):
        for name, shape in layer.items():
            shapes[f"blk.{number}.{name}.weight"] = shape
            if config.model_type == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                shapes[f"blk.{number}.{name}.bias"] = shape[:1]
    return shapes


def _theirs(name: str) -> str:
    match = _IN_LAYER.fullmatch(name)
    return _TOP[name] if match is None else f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"


def _readable(type_: Any) -> bool:
    """Whether gguf dequantises tensors of this type; asked with one block of zeros."""
    from gguf import GGML_QUANT_SIZES, dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[type_][1]), dtype=np.uint8), type_)
    except NotImplementedError:
        return False
    return True


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
