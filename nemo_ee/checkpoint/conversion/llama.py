# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Hugging Face's Llama family in megatron-core's terms: the weights and the NeMo configuration.

Supported: ``LlamaForCausalLM``, ``MistralForCausalLM`` without a sliding window, ``Qwen2ForCausalLM``; tied
or untied embeddings, grouped-query attention, RoPE unscaled, linearly scaled or scaled as Llama 3.1's.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from numbers import Integral, Real
from typing import Any

import torch

from nemo_ee.checkpoint import model_config
from nemo_ee.errors import CheckpointError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
ROWS = "embedding_rows"
"""Of the ``model`` section: rows of the embedding that count, where they are not as many as the tokenizer's tokens."""

_SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "vocab_size": "embedding_rows",
    "max_position_embeddings": "max_position_embeddings",
}
"""transformers' names of sizes -> NeMo's, whose limits hold."""
_NUMBERS = ("rms_norm_eps", "rope_theta")
_ROPE_NUMBERS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def check_supported(config: Any) -> None:
    """Refuses what the conversion would get wrong.

    Args:
        config: a transformers ``PretrainedConfig``.

    Raises:
        CheckpointError: lists every unsupported property, one per line.
    """
    faults = []

    def require(fine: bool, key: str, value: Any, rule: str) -> None:
        if not fine:
            faults.append(f"{key}={value}: {rule}; convert a checkpoint that has it so")

    names = getattr(config, "architectures", None) or [type(config).__name__]
    require(
        names[0] in ARCHITECTURES, "architectures", names[0], f"must be one of {', '.join(ARCHITECTURES)}"
    )
    for key, value, rule in () if faults else _wrong_values(config):
        require(False, key, value, rule)
    if not faults:
        require(config.hidden_act == "silu", "hidden_act", config.hidden_act, "must be silu")
        for key in ("attention_bias", "mlp_bias"):
            require(
                not getattr(config, key, False), key, True, "only Qwen2's bias on Q, K and V is supported"
            )
        window = getattr(config, "sliding_window", None)
        used = names[0] == "MistralForCausalLM" or getattr(config, "use_sliding_window", False)
        short = used and window is not None and window < config.max_position_embeddings
        require(not short, "sliding_window", window, "attention must reach max_position_embeddings")
        kind = _rope_kind(config)
        require(
            kind in ("default", "linear", "llama3"), "rope_scaling", kind, "must be default, linear or llama3"
        )
        for key in _ROPE_NUMBERS.get(kind, ()):
            value = config.rope_scaling.get(key)
            require(_is_positive(value), f"rope_scaling.{key}", value, "must be a positive number")
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        require(
            heads % groups == 0, "num_key_value_heads", groups, f"must divide num_attention_heads={heads}"
        )
    if faults:
        raise CheckpointError("\n".join(faults))


def _wrong_values(config: Any) -> Iterator[tuple[str, Any, str]]:
    """Sizes and numbers that are none, with the rule."""
    for key, name in _SIZES.items():
        value, most = getattr(config, key, None), model_config.SIZES[name]
        if value is None and key == "head_dim":
            continue
        if not (isinstance(value, Integral) and not isinstance(value, bool) and 1 <= value <= most):
            yield key, value, f"must be a whole number, 1 to {most}"
    for key in _NUMBERS:
        if not _is_positive(value := getattr(config, key, None)):
            yield key, value, "must be a positive number"


def _is_positive(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < value < float("inf")


def head_size(config: Any) -> int:
    """Width of one attention head (``kv_channels``)."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def vocabulary_divisor(tokens: int, rows: int) -> int:
    """The ``make_vocab_size_divisible_by`` with which the vocabulary holds every row of the embedding.

    NeMo pads the *tokenizer's* size at TP 1; an embedding is often larger than its tokenizer.

    Args:
        tokens: size of the tokenizer, added tokens included.
        rows: rows of the embedding.
    """
    divisor = 128
    while -(-tokens // divisor) * divisor < rows:
        divisor *= 2
    return divisor


def to_megatron(
    weights: MutableMapping[str, torch.Tensor], config: Any, padded_vocab_size: int
) -> dict[str, torch.Tensor]:
    """Maps a Hugging Face state dict to megatron-core's ``GPTModel``, in the canonical (fused-norm) names.

    - Q, K and V become ``linear_qkv``, interleaved by query group: the group's queries, its key, its value.
    - Gate and up projection become ``linear_fc1``, gate first.
    - The embedding, and an untied output layer, are padded with rows of zeros.

    Args:
        weights: consumed: each tensor is removed once it is mapped, so that one copy is held.
        config: the transformers configuration, already checked by :func:`check_supported`.
        padded_vocab_size: rows of the resulting embedding.

    Returns:
        Full (TP 1, PP 1) tensors by key, ``embedding.word_embeddings.weight`` and so on, in the given dtype.

    Raises:
        CheckpointError: a weight is missing or left over.
    """

    def take(name: str) -> torch.Tensor:
        try:
            return weights.pop(name)
        except KeyError as error:
            raise CheckpointError(
                f"{name}: is missing from the checkpoint; download all its files again"
            ) from error

    groups, size = config.num_key_value_heads, head_size(config)
    out = {
        "embedding.word_embeddings.weight": _pad_rows(take("model.embed_tokens.weight"), padded_vocab_size)
    }
    for n in range(config.num_hidden_layers):
        source, target = f"model.layers.{n}.", f"decoder.layers.{n}."
        attention = source + "self_attn."
        out[target + "self_attention.linear_qkv.layer_norm_weight"] = take(source + "input_layernorm.weight")
        for kind in ("weight", "bias"):
            names = [f"{attention}{letter}_proj.{kind}" for letter in "qkv"]
            if kind == "weight" or names[0] in weights:
                out[f"{target}self_attention.linear_qkv.{kind}"] = interleave_qkv(
                    *(take(name) for name in names), groups=groups, head=size
                )
        out[target + "self_attention.linear_proj.weight"] = take(attention + "o_proj.weight")
        out[target + "mlp.linear_fc1.layer_norm_weight"] = take(source + "post_attention_layernorm.weight")
        gate, up = take(source + "mlp.gate_proj.weight"), take(source + "mlp.up_proj.weight")
        out[target + "mlp.linear_fc1.weight"] = torch.cat((gate, up))
        out[target + "mlp.linear_fc2.weight"] = take(source + "mlp.down_proj.weight")
    out["decoder.final_layernorm.weight"] = take("model.norm.weight")
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    else:
        out["output_layer.weight"] = _pad_rows(take("lm_head.weight"), padded_vocab_size)
    left = [name for name in weights if not name.endswith("rotary_emb.inv_freq")]
    if left:
        raise CheckpointError(
            f"{', '.join(sorted(left)[:3])}: {len(left)} weights have no place in a plain GPT model; "
            "convert a checkpoint without them"
        )
    return out


def interleave_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: int, head: int) -> torch.Tensor:
    """Joins Q, K and V by query group: a group's queries, its key, its value.

    Args:
        q: [heads * head, ...].
        k: [groups * head, ...].
        v: [groups * head, ...].
        groups: number of query groups.
        head: width of one head.

    Returns:
        [(heads + 2 * groups) * head, ...].
    """
    parts = [part.reshape(groups, -1, head, *part.shape[1:]) for part in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, *q.shape[1:])


def nemo_config(config: Any, tokens: int, precision: str) -> dict[str, Any]:
    """The ``model`` section of a plain NeMo GPT checkpoint with these weights.

    Args:
        config: the transformers configuration, already checked by :func:`check_supported`.
        tokens: size of the tokenizer.
        precision: NeMo's name: ``32``, ``bf16`` or ``16``.

    Returns:
        Plain values, ready for OmegaConf. Parallel sizes are 1; ``tokenizer`` is left to the caller.
    """
    mapping: dict[str, Any] = {
        "mcore_gpt": True,
        "transformer_engine": True,
        "precision": precision,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "sequence_parallel": False,
        "megatron_amp_O2": False,
        # the shape of the model
        "encoder_seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": head_size(config),
        "make_vocab_size_divisible_by": vocabulary_divisor(tokens, config.vocab_size),
        "share_embeddings_and_output_weights": bool(config.tie_word_embeddings),
        "pre_process": True,
        "post_process": True,
        # the layers
        "normalization": "rmsnorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "activation": "fast-swiglu",
        "bias": False,
        "qkv_bias": config.model_type == "qwen2",
        "transformer_block_type": "pre_ln",
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "rotary_base": config.rope_theta,
        "apply_query_key_layer_scaling": False,
        "normalize_attention_scores": True,
        "attention_type": "multihead",
        "hidden_dropout": 0.0,
        "attention_dropout": getattr(config, "attention_dropout", 0.0),
        "ffn_dropout": 0.0,
        "init_method_std": config.initializer_range,
        "use_scaled_init_method": True,
        # fused kernels and communication: on only where a machine has them
        "bias_activation_fusion": False,
        "bias_dropout_add_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "get_attention_mask_from_fusion": True,
        "batch_p2p_comm": True,
        "gradient_as_bucket_view": False,
        "use_cpu_initialization": False,
        "activations_checkpoint_granularity": None,
        "activations_checkpoint_method": None,
        "activations_checkpoint_num_layers": None,
        "dist_ckpt_format": "torch_dist",
        "seed": 1234,
        "optim": {"name": "adamw", "lr": 2e-4, "weight_decay": 0.01, "betas": [0.9, 0.98]},
    }
    mapping.update(_rope_scaling(config))
    return mapping


def _rope_kind(config: Any) -> str:
    scaling = getattr(config, "rope_scaling", None) or {}
    return scaling.get("rope_type", scaling.get("type", "default"))


def _rope_scaling(config: Any) -> dict[str, Any]:
    scaling: Mapping[str, Any] = getattr(config, "rope_scaling", None) or {}
    if _rope_kind(config) == "linear":
        return {"seq_len_interpolation_factor": scaling["factor"]}
    if _rope_kind(config) == "llama3":  # names of NeMo's mcore_model_customize
        return {
            "seq_len_interpolation_factor": None,
            "scale_positional_embedding": True,
            "scale_factor": scaling["factor"],
            "low_freq_factor": scaling["low_freq_factor"],
            "high_freq_factor": scaling["high_freq_factor"],
            "old_context_len": scaling["original_max_position_embeddings"],
        }
    return {"seq_len_interpolation_factor": None}


def _pad_rows(weight: torch.Tensor, rows: int) -> torch.Tensor:
    assert weight.shape[0] <= rows, (weight.shape, rows)
    return torch.cat((weight, weight.new_zeros(rows - weight.shape[0], weight.shape[1])))
