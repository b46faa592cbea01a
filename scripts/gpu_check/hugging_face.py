# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Our model's weights in transformers, for a comparison on equal terms; the inverse of `llama.to_megatron`."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_ee.checkpoint.keys import canonical
from nemo_ee.errors import CheckpointError


@torch.no_grad()
def copied(model: Any) -> LlamaForCausalLM:
    """Transformers' model with copies of the weights, in the same dtype and on the same device, in eval mode.

    Args:
        model: a `MegatronGPTEarlyExitModel` on one process; its exits are left out.

    Raises:
        CheckpointError: it is no plain Llama.
    """
    cfg = model.cfg
    if (
        cfg.normalization != "rmsnorm"
        or cfg.activation != "fast-swiglu"
        or cfg.get("scale_positional_embedding")
    ):
        raise CheckpointError("the model is no Llama with plain rotary embeddings; leave --model out")
    gpt, state = model.gpt, {}
    weights = {
        canonical(name): value for name, value in gpt.named_parameters() if not name.startswith("exits.")
    }
    config = configuration(cfg, len(weights["embedding.word_embeddings.weight"]), model.tokenizer.eos_id)
    weights.pop("output_layer.weight", None)  # None of its own where it is tied; `output_weight` is either
    for n in range(cfg.num_layers):
        source, target = f"decoder.layers.{n}.", f"model.layers.{n}."
        attention = source + "self_attention."
        q, k, v = split_qkv(weights.pop(attention + "linear_qkv.weight"), config)
        gate, up = weights.pop(source + "mlp.linear_fc1.weight").chunk(2)
        state |= {
            target + "self_attn.q_proj.weight": q,
            target + "self_attn.k_proj.weight": k,
            target + "self_attn.v_proj.weight": v,
            target + "self_attn.o_proj.weight": weights.pop(attention + "linear_proj.weight"),
            target + "mlp.gate_proj.weight": gate,
            target + "mlp.up_proj.weight": up,
            target + "mlp.down_proj.weight": weights.pop(source + "mlp.linear_fc2.weight"),
            target + "input_layernorm.weight": weights.pop(attention + "linear_qkv.layer_norm_weight"),
            target + "post_attention_layernorm.weight": weights.pop(
                source + "mlp.linear_fc1.layer_norm_weight"
            ),
        }
    state["model.embed_tokens.weight"] = weights.pop("embedding.word_embeddings.weight")
    state["model.norm.weight"] = weights.pop("decoder.final_layernorm.weight")
    state["lm_head.weight"] = gpt.output_weight()
    if weights:
        raise CheckpointError(
            f"{', '.join(sorted(weights)[:3])}: the model is no plain Llama; leave --model out"
        )
    some = state["model.norm.weight"]
    with torch.device("meta"):
        other = LlamaForCausalLM(config).to(some.dtype)
    other.to_empty(device=some.device)
    other.load_state_dict(state)
    other.tie_weights()
    other.model.rotary_emb = type(other.model.rotary_emb)(
        config, device=some.device
    )  # no weight: not in the state
    return other.eval()


def configuration(cfg: Any, rows: int, eos: int) -> LlamaConfig:
    """Of a model with so many rows of the embedding."""
    return LlamaConfig(
        vocab_size=rows,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.ffn_hidden_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_attention_heads,
        num_key_value_heads=cfg.num_query_groups,
        head_dim=cfg.get("kv_channels") or cfg.hidden_size // cfg.num_attention_heads,
        max_position_embeddings=cfg.max_position_embeddings,
        rms_norm_eps=cfg.layernorm_epsilon,
        rope_theta=float(cfg.get("rotary_base", 10000)),
        tie_word_embeddings=bool(cfg.share_embeddings_and_output_weights),
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=eos,
        attn_implementation="sdpa",
    )


def split_qkv(weight: Tensor, config: LlamaConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V of a weight that is interleaved by query group."""
    groups, size = config.num_key_value_heads, config.head_dim
    by_group = weight.view(groups, -1, size, weight.shape[-1])
    queries = by_group.shape[1] - 2
    return tuple(part.reshape(-1, weight.shape[-1]) for part in by_group.split((queries, 1, 1), dim=1))
