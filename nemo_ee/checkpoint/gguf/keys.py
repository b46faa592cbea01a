# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which keys of a GGUF file are used, which say nothing of the model, and which are refused.

Source: llama.cpp's ``src/llama-arch.cpp`` (names), ``src/llama-model.cpp`` and ``src/llama-vocab.cpp`` (who
reads them).
"""

from collections.abc import Iterator, Mapping
from typing import Any

REMEDY = "convert its Hugging Face directory instead: input_name_or_path=DIRECTORY"

MODEL_USED = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.type",
    "vocab_size",
}
"""Below ``<architecture>.``: read by :mod:`.model` and :mod:`.rope`."""

MODEL_IGNORED = {
    "attention.layer_norm_epsilon",  # of LayerNorm; these models have RMSNorm
    "rope.scaling.finetuned",  # a remark
    "rope.scaling.original_context_length",  # of yarn and longrope, which are refused
}

MODEL_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),  # 0 stands for 1 / sqrt(head size)
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "tensor_data_layout": ("Meta AI original pth",),  # Q and K permuted, as this architecture's always are
    "use_parallel_residual": (False,),
}
"""Below ``<architecture>.``: change the model unless they have one of these values."""

TOKENIZER_USED = {
    "add_bos_token",
    "add_space_prefix",
    "bos_token_id",
    "eom_token_id",
    "eos_token_id",
    "eot_token_id",
    "fim_pad_token_id",
    "fim_rep_token_id",
    "fim_sep_token_id",
    "merges",
    "model",
    "padding_token_id",
    "pre",
    "scores",
    "token_type",
    "tokens",
    "unknown_token_id",
}
"""Below ``tokenizer.ggml.``: read by :mod:`.vocabulary`."""

TOKENIZER_IGNORED = {
    # names of single tokens that ordinary text and chats never use
    "cls_token_id",
    "fim_mid_token_id",
    "fim_pre_token_id",
    "fim_suf_token_id",
    "mask_token_id",
    "middle_token_id",
    "prefix_token_id",
    "separator_token_id",
    "seperator_token_id",  # as llama.cpp spells it
    "suffix_token_id",
    "token_type_count",  # of BERT's segments
}

TOKENIZER_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_eos_token": (False,),
    "add_sep_token": (False,),
    "remove_extra_whitespaces": (False,),
    "suppress_tokens": ([],),
}

TEMPLATES = "tokenizer.chat_template"
OTHER_TOKENIZER_KEYS = {
    TEMPLATES,
    f"{TEMPLATES}s",  # the names of the others
    "tokenizer.huggingface.json",  # a copy, which llama.cpp does not read either
}

FOREIGN_NAMESPACES = ("adapter.", "clip.", "diffusion.", "xielu.")
"""Keys of other kinds of networks. All other namespaces (``general.``, ``quantize.``, a quantiser's own name)
describe how the file was made."""


def faults(values: Mapping[str, Any], architecture: str) -> Iterator[str]:
    """Every key that would change the model or its tokenizer, and is not understood.

    Args:
        values: all keys of the file.
        architecture: its ``general.architecture``, a supported one.

    Yields:
        One line each: key, value, rule, remedy.
    """
    for key, value in values.items():
        section, _, name = key.partition(".")
        if section == architecture:
            yield from _judge(key, name, value, MODEL_USED | MODEL_IGNORED, MODEL_NEUTRAL)
        elif key == "tokenizer.ggml.add_eos_token" and value:
            yield (
                f"{key}={shown(value)}: must be False or absent, or every prompt would end with the end of text; "
                f'set it to False: gguf-set-metadata FILE.gguf {key} "" --force'
            )
        elif key.startswith("tokenizer.ggml."):
            name = key.removeprefix("tokenizer.ggml.")
            yield from _judge(key, name, value, TOKENIZER_USED | TOKENIZER_IGNORED, TOKENIZER_NEUTRAL)
        elif section == "tokenizer" and not key.startswith(f"{TEMPLATES}."):
            yield from _judge(key, key, value, OTHER_TOKENIZER_KEYS, {})
        elif key.startswith(FOREIGN_NAMESPACES) or (key == "general.type" and value != "model"):
            yield f"{key}={shown(value)}: is no part of a plain GPT model; convert the language model's own file"
        elif key == "split.count" and value not in (0, 1):
            yield (
                f"{key}={shown(value)}: the model must be in one file; "
                "join the parts with llama.cpp's: llama-gguf-split --merge FIRST_PART JOINED.gguf"
            )


def _judge(
    key: str, name: str, value: Any, known: set[str], neutral: Mapping[str, tuple[Any, ...]]
) -> Iterator[str]:
    if name in neutral:
        if value not in neutral[name]:
            allowed = " or ".join(str(each) for each in neutral[name])
            yield f"{key}={shown(value)}: must be {allowed} or absent; {REMEDY}"
    elif name not in known:
        yield f"{key}={shown(value)}: is not understood; {REMEDY}"


def shown(value: Any) -> str:
    """A value short enough for a message, and fit for a terminal."""
    text = str(value)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 60 else f"{text[:57]}..."
