# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which NeMo checkpoints are a plain Llama, Mistral or Qwen2, and their configuration in Hugging Face's terms.

The inverse of :mod:`nemo_ee.checkpoint.conversion.llama`.
"""

import os
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_ee.errors import ConfigError, Fault
from nemo_ee.generation.generating import position_limit
from nemo_ee.models.checks.key_rules import CUSTOMIZATION, KeyRule
from nemo_ee.models.checks.model_checks import LAYER_SPECS

_DEFAULTS = {
    "mcore_gpt": False,
    "normalization": "layernorm",
    "activation": "gelu",
    "bias": True,
    "position_embedding_type": "learned_absolute",
}
"""What NeMo takes where a checkpoint says nothing and Llama has another."""
_HARMLESS = ("fusion", "_ratio", "cuda_graph")
"""In the name of a key of `mcore_customization_config` that changes no result."""


def _rule(key: str, use: Any, reason: str, *also: Any) -> KeyRule:
    return KeyRule(
        key, use, reason, also, remedy="no plain Hugging Face model computes it: export another checkpoint"
    )


RULES = (
    _rule("mcore_gpt", True, "is NeMo's GPT of before megatron-core"),
    _rule("name", "te_gpt", "names layers that are not Llama's", *LAYER_SPECS),
    _rule(
        "normalization", "rmsnorm", "Llama's norms are RMSNorm, with a gain around 1 and no bias", "RMSNorm"
    ),
    _rule("activation", "fast-swiglu", "Llama's MLPs have SwiGLU", "swiglu"),
    _rule(
        "bias",
        False,
        "Llama's layers have no biases; of Q, K and V alone (qkv_bias), as Qwen2's, they may have",
    ),
    _rule("position_embedding_type", "rope", "Llama's positions are rotary"),
    _rule("rotary_percentage", 1.0, "Llama rotates whole heads", 1),
    *(
        _rule(key, None, "Llama's layers have no such thing")
        for key in (
            "rotary_interleaved",
            "qk_layernorm",
            "window_size",
            "softmax_scale",
            "no_rope_freq",
            "num_moe_experts",
            "multi_latent_attention",
            "mtp_num_layers",
            "heterogeneous_block_specs",
            "apply_embedding_scaling",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "query_pre_attn_scalar",
        )
    ),
)
"""Of the `model` section of a checkpoint that can be exported."""


def check_plain(model: DictConfig, path: str | os.PathLike) -> None:
    """Refuses models that no plain Llama, Mistral or Qwen2 computes.

    Args:
        model: a checkpoint's `model` section.
        path: of the checkpoint, for errors.

    Raises:
        ConfigError: names every key that says so.
    """
    whole = OmegaConf.merge(_DEFAULTS, model)
    faults = [fault for rule in RULES for fault in rule.faults(whole)]
    faults += _other_faults(model)
    if faults:
        raise ConfigError(*(Fault(f.key, f.value, f"{f.rule} ({path} says so)", f.remedy) for f in faults))


def _other_faults(model: DictConfig) -> Iterator[Fault]:
    known = {rule.key for rule in RULES}
    remedy = RULES[0].remedy or ""
    for key, value in (model.get(CUSTOMIZATION) or {}).items():
        if value and key not in known and not any(part in key for part in _HARMLESS):
            yield Fault(f"model.{CUSTOMIZATION}.{key}", value, "Llama's layers have no such thing", remedy)
    if _factor(model) and model.get("scale_positional_embedding"):
        rule = "Llama's positions are scaled by it or by scale_positional_embedding, not by both"
        yield Fault("model.seq_len_interpolation_factor", _factor(model), rule, remedy)


def _factor(model: DictConfig) -> float | None:
    factor = model.get("seq_len_interpolation_factor")
    return None if factor in (None, 1) else float(factor)


def architecture_of(model: DictConfig, wanted: str | None) -> str:
    """The architecture of the base: what was asked for, or the one that fits.

    Raises:
        ConfigError: one was asked for that does not fit.
    """
    biased = bool(model.get("qkv_bias"))
    if wanted is not None and (wanted == "qwen2") != biased:
        has = ("no biases", "have some") if biased else ("biases", "have none")
        rule = f"its Q, K and V have {has[0]}, and the checkpoint's {has[1]}"
        raise ConfigError(
            Fault("architecture", wanted, rule, f"set architecture={'qwen2' if biased else 'llama'}")
        )
    return wanted or ("qwen2" if biased else "llama")


def hugging_face_config(model: DictConfig, architecture: str, rows: int, dtype: Any, **more: Any) -> Any:
    """The transformers configuration of a model that `check_plain` let pass.

    Args:
        model: the `model` section.
        architecture: one of `settings.ARCHITECTURES`.
        rows: of the embedding, padding apart.
        dtype: of the weights.
        more: keys to add, e.g. ids of special tokens.
    """
    from transformers import LlamaConfig, MistralConfig, Qwen2Config

    kind = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}[architecture]
    heads = model.num_attention_heads
    own = {"llama": {}, "mistral": {"sliding_window": None}, "qwen2": {"use_sliding_window": False}}[
        architecture
    ]
    return kind(
        vocab_size=rows,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=model.get("num_query_groups") or heads,
        head_dim=model.get("kv_channels") or model.hidden_size // heads,
        hidden_act="silu",
        max_position_embeddings=position_limit(model),
        initializer_range=model.get("init_method_std", 0.02),
        rms_norm_eps=model.get("layernorm_epsilon", 1e-5),
        rope_theta=float(model.get("rotary_base", 10000)),
        rope_scaling=_rope_scaling(model),
        attention_dropout=model.get("attention_dropout", 0.0),
        tie_word_embeddings=bool(model.get("share_embeddings_and_output_weights", True)),
        torch_dtype=dtype,
        architectures=[kind.__name__.replace("Config", "ForCausalLM")],
        **own,
        **more,
    )


def _rope_scaling(model: DictConfig) -> dict[str, Any] | None:
    if model.get("scale_positional_embedding"):
        return {
            "rope_type": "llama3",
            "factor": float(model.get("scale_factor", 8)),
            "low_freq_factor": float(model.get("low_freq_factor", 1)),
            "high_freq_factor": float(model.get("high_freq_factor", 4)),
            "original_max_position_embeddings": model.get("old_context_len", 8192),
        }
    return {"rope_type": "linear", "factor": factor} if (factor := _factor(model)) else None
