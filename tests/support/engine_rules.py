# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What vLLM and SGLang would read of an exported draft.

The rules were read in the packages vllm 0.33.0 (model_executor/models/llama.py and qwen2.py,
model_executor/model_loader/default_loader.py, config/speculative.py, v1/spec_decode/draft_model.py) and sglang 0.5.23
(srt/models/llama.py and qwen2.py, srt/speculative/standalone_worker_v2.py) on PyPI; neither was run. They say:

- both fuse Q, K, V and gate, up; Q, K and V have biases where `attention_bias` is true, and Qwen2's always; the output
  projection where it is true; MLPs where `mlp_bias` is, in vLLM, and never in SGLang;
- `lm_head.weight` is read unless `tie_word_embeddings`;
- vLLM reads all of a folder's `*.safetensors`, or those that its index names;
- the draft's `vocab_size` equals the base's; for SGLang the tokenizers' vocabularies do, too.
"""

FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


def parameters(config: dict, engine: str) -> set[str]:
    """Names of the parameters that an engine builds for a configuration."""
    qwen2 = config["architectures"] == ["Qwen2ForCausalLM"]
    biased = {
        "self_attn.qkv_proj": qwen2 or config.get("attention_bias", False),
        "self_attn.o_proj": not qwen2 and config.get("attention_bias", False),
        "mlp.gate_up_proj": engine == "vllm" and not qwen2 and config.get("mlp_bias", False),
        "mlp.down_proj": engine == "vllm" and not qwen2 and config.get("mlp_bias", False),
    }
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    names |= set() if config["tie_word_embeddings"] else {"lm_head.weight"}
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        names |= {f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight"}
        for name, has_bias in biased.items():
            names |= {f"{layer}{name}.weight"} | ({f"{layer}{name}.bias"} if has_bias else set())
    return names


def fused(name: str) -> str:
    """Where an engine puts a weight of that name."""
    parts = name.split(".")
    return ".".join(FUSED.get(part, part) for part in parts)
