# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Tiny random models of several families, each as a Hugging Face directory and as the NeMo checkpoint of it.

The vocabulary of 101 tokens needs padding. Norms and biases are random too, not 1 and 0.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from nemo_ee.checkpoint.conversion.llama import interleave_qkv
from tests.support import tiny_llama

VOCABULARY, POSITIONS, LAYERS, HIDDEN, HEADS = 101, 32, 4, 32, 4
LLAMA31_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

Weights = dict[str, Tensor]


def settings(family: str) -> Any:
    """The Hugging Face configuration of one of `FAMILIES`."""
    from transformers import GemmaConfig, GPT2Config, GPTNeoXConfig, Qwen2Config

    shared = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, initializer_range=0.2)
    llama = {
        **tiny_llama.config(**shared, max_position_embeddings=POSITIONS).to_dict(),
        "architectures": None,
    }
    for key in ("model_type", "transformers_version", "architectures", "head_dim"):
        llama.pop(key, None)
    if family == "Qwen2":
        return Qwen2Config(**llama)
    if family == "Llama 3.1":
        changes = dict(tie_word_embeddings=False, rope_scaling=LLAMA31_SCALING)
        return tiny_llama.config(**shared, max_position_embeddings=POSITIONS, **changes)
    if family == "Gemma":
        return GemmaConfig(**{**llama, "head_dim": 16, "hidden_act": "gelu_pytorch_tanh"})
    if family == "GPT-2":
        widths = dict(n_positions=POSITIONS, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS)
        silent = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
        return GPT2Config(**shared, **widths, **silent)
    assert family == "GPT-NeoX, one branch after the other"
    return GPTNeoXConfig(
        **shared,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        rotary_pct=0.5,
        use_parallel_residual=False,
        hidden_act="gelu",  # exact, as Megatron's fused kernel is not
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )


def write(family: str, folder: Path) -> Path:
    """Saves a Hugging Face model with its tokenizer; returns its directory."""
    torch.manual_seed(3)
    network = tiny_llama.model(settings(family), seed=3)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if name.endswith("bias"):
                value.normal_(std=0.2)
            elif "norm" in name or "ln_" in name:
                value.uniform_(-0.5, 0.5) if family == "Gemma" else value.uniform_(0.5, 1.5)
    network.save_pretrained(folder)
    tiny_llama.tokenizer(VOCABULARY).save_pretrained(folder)
    return folder


def to_nemo(family: str, source: str, path: str) -> None:
    """Writes the NeMo checkpoint; run it in a rank of its own."""
    if family in ("Qwen2", "Llama 3.1"):
        from nemo_ee.checkpoint.conversion.convert import convert_to_nemo

        convert_to_nemo(source, path)
        return
    from transformers import AutoModelForCausalLM

    from nemo_ee.checkpoint import keys
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel as Model
    from tests.support.tiny_gpt import tiny_trainer

    network = AutoModelForCausalLM.from_pretrained(source)
    mapped, described = _MAPPED[family](dict(network.state_dict()))
    config = OmegaConf.create(
        dict(
            mcore_gpt=True,
            micro_batch_size=1,
            global_batch_size=1,
            encoder_seq_length=POSITIONS,
            max_position_embeddings=POSITIONS,
            num_layers=LAYERS,
            hidden_size=HIDDEN,
            ffn_hidden_size=64,
            num_attention_heads=HEADS,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            layernorm_epsilon=1e-5,
            precision=32,
            tokenizer=dict(library="huggingface", type=source, use_fast=True),
            optim=dict(name="adamw", lr=1e-3),
        )
    )
    model = Model(OmegaConf.merge(config, described), tiny_trainer())
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in mapped:
            rows = mapped[name].new_zeros(model.padded_vocab_size - VOCABULARY, HIDDEN)
            mapped[name] = torch.cat((mapped[name], rows))
    result = model.gpt.load_state_dict(keys.respell(mapped, model.gpt.state_dict()), strict=False)
    assert not result.unexpected_keys and not result.missing_keys, result
    model.save_to(path)


def _gemma(theirs: Weights) -> tuple[Weights, dict]:
    """Norms of gain 1 + weight, a GELU-gated MLP, scaled embeddings, heads wider than hidden / heads; tied."""
    mapped = {
        "embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": theirs["model.norm.weight"],
    }
    for n in range(LAYERS):
        mine, his = f"decoder.layers.{n}.", f"model.layers.{n}."
        q, k, v = (theirs[f"{his}self_attn.{letter}_proj.weight"] for letter in "qkv")
        gated = [theirs[f"{his}mlp.{name}_proj.weight"] for name in ("gate", "up")]
        mapped |= {
            f"{mine}self_attention.linear_qkv.layer_norm_weight": theirs[f"{his}input_layernorm.weight"],
            f"{mine}self_attention.linear_qkv.weight": interleave_qkv(q, k, v, groups=2, head=16),
            f"{mine}self_attention.linear_proj.weight": theirs[f"{his}self_attn.o_proj.weight"],
            f"{mine}mlp.linear_fc1.layer_norm_weight": theirs[f"{his}post_attention_layernorm.weight"],
            f"{mine}mlp.linear_fc1.weight": torch.cat(gated),
            f"{mine}mlp.linear_fc2.weight": theirs[f"{his}mlp.down_proj.weight"],
        }
    return mapped, dict(
        normalization="rmsnorm",
        layernorm_zero_centered_gamma=True,
        apply_embedding_scaling=True,
        activation="geglu",
        bias=False,
        kv_channels=16,
        num_query_groups=2,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )


def _with_biases(mapped: Weights, mine: str, parts: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, (weight, bias) in parts.items():
        separator = "_" if name.endswith("layer_norm") else "."
        mapped[f"{mine}{name}{separator}weight"], mapped[f"{mine}{name}{separator}bias"] = weight, bias


def _gpt2(theirs: Weights) -> tuple[Weights, dict]:
    """LayerNorm, biases, learned positions, GELU by tanh; tied. Its weights are stored transposed."""

    def pair(name: str, transposed: bool = False) -> tuple[Tensor, Tensor]:
        weight = theirs[f"transformer.{name}.weight"]
        return weight.t() if transposed else weight, theirs[f"transformer.{name}.bias"]

    mapped: Weights = {
        "embedding.word_embeddings.weight": theirs["transformer.wte.weight"],
        "embedding.position_embeddings.weight": theirs["transformer.wpe.weight"],
    }
    _with_biases(mapped, "decoder.", {"final_layernorm": pair("ln_f")})
    for n in range(LAYERS):
        joined = [part.chunk(3) for part in pair(f"h.{n}.attn.c_attn", True)]
        qkv = tuple(interleave_qkv(*parts, groups=HEADS, head=HIDDEN // HEADS) for parts in joined)
        _with_biases(
            mapped,
            f"decoder.layers.{n}.",
            {
                "self_attention.linear_qkv.layer_norm": pair(f"h.{n}.ln_1"),
                "self_attention.linear_qkv": qkv,
                "self_attention.linear_proj": pair(f"h.{n}.attn.c_proj", True),
                "mlp.linear_fc1.layer_norm": pair(f"h.{n}.ln_2"),
                "mlp.linear_fc1": pair(f"h.{n}.mlp.c_fc", True),
                "mlp.linear_fc2": pair(f"h.{n}.mlp.c_proj", True),
            },
        )
    return mapped, dict(
        normalization="layernorm",
        activation="gelu",
        bias=True,
        ffn_hidden_size=4 * HIDDEN,
        position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=True,
    )


def _neox(theirs: Weights) -> tuple[Weights, dict]:
    """LayerNorm, biases, exact GELU, rotary positions on a half of each head; untied."""

    def pair(name: str) -> tuple[Tensor, Tensor]:
        return theirs[f"gpt_neox.{name}.weight"], theirs[f"gpt_neox.{name}.bias"]

    mapped: Weights = {
        "embedding.word_embeddings.weight": theirs["gpt_neox.embed_in.weight"],
        "output_layer.weight": theirs["embed_out.weight"],
    }
    _with_biases(mapped, "decoder.", {"final_layernorm": pair("final_layer_norm")})
    for n in range(LAYERS):
        _with_biases(
            mapped,
            f"decoder.layers.{n}.",
            {
                "self_attention.linear_qkv.layer_norm": pair(f"layers.{n}.input_layernorm"),
                "self_attention.linear_qkv": pair(f"layers.{n}.attention.query_key_value"),  # by head already
                "self_attention.linear_proj": pair(f"layers.{n}.attention.dense"),
                "mlp.linear_fc1.layer_norm": pair(f"layers.{n}.post_attention_layernorm"),
                "mlp.linear_fc1": pair(f"layers.{n}.mlp.dense_h_to_4h"),
                "mlp.linear_fc2": pair(f"layers.{n}.mlp.dense_4h_to_h"),
            },
        )
    return mapped, dict(
        normalization="layernorm",
        activation="gelu",
        bias_activation_fusion=False,
        bias=True,
        position_embedding_type="rope",
        rotary_percentage=0.5,
        share_embeddings_and_output_weights=False,
    )


_MAPPED: dict[str, Callable[[Weights], tuple[Weights, dict]]] = {
    "Gemma": _gemma,
    "GPT-2": _gpt2,
    "GPT-NeoX, one branch after the other": _neox,
}
FAMILIES = ("Qwen2", "Llama 3.1", *_MAPPED)
