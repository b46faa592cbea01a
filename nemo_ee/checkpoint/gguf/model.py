# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The model of a GGUF file as a transformers configuration, with llama.cpp's defaults where a key is missing."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nemo_ee.checkpoint.gguf import rope
from nemo_ee.checkpoint.gguf.keys import REMEDY, shown
from nemo_ee.errors import CheckpointError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
LARGEST = 2**27
"""Of what is counted in keys; far beyond any model, and small enough to reckon with."""
EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"


def config(values: Mapping[str, Any], found: Mapping[str, Any]) -> Any:
    """A ``LlamaConfig`` or ``Qwen2Config``.

    Args:
        values: all keys of the file.
        found: all its tensors, as gguf's reader gives them.

    Raises:
        CheckpointError: a key is missing, or has a value that these architectures do not support.
    """
    from transformers import LlamaConfig, Qwen2Config

    architecture = values["general.architecture"]
    faults = []

    def fault(name: str, value: Any, rule: str) -> None:
        faults.append(f"{architecture}.{name}={shown(value)}: {rule}; {REMEDY}")

    def value(name: str, default: Any = None) -> Any:
        """One number for all layers, or a list of equal ones."""
        given = values.get(f"{architecture}.{name}", default)
        if isinstance(given, list):
            if len(set(given)) != 1:
                fault(name, given, "must be the same in every layer")
            given = given[0] if given else None
        if given is None:
            fault(name, "null", "is missing, and there is no model without it")
            return 1
        if not rope.is_number(given):
            fault(name, given, "must be a finite number")
            return 1
        return given

    def whole(name: str, default: Any = None, least: int = 1, most: int = LARGEST) -> int:
        given = value(name, default)
        if int(given) == given and least <= given <= most:
            return int(given)
        fault(name, given, f"must be a whole number, {least} to {most}")
        return 1

    hidden, heads = whole("embedding_length"), whole("attention.head_count")
    head = whole("attention.key_length", max(hidden // heads, 1))
    for name in ("attention.value_length", "rope.dimension_count"):
        if whole(name, head) != head:
            fault(name, value(name), f"must be the key's head size, {head}")
    context = whole("context_length")
    window = whole("attention.sliding_window", 0, least=0)
    if 0 < window < context:
        fault("attention.sliding_window", window, f"attention must reach context_length={context}")
    base = float(value("rope.freq_base", 10000.0))
    if base <= 0:
        fault("rope.freq_base", base, "must be above 0")
    if EMBEDDING not in found:
        raise CheckpointError(f"{EMBEDDING}: is missing; download the whole file again")
    rows = int(found[EMBEDDING].shape[-1])
    if whole("vocab_size", rows) != rows:
        fault("vocab_size", value("vocab_size"), f"must be the {rows} rows of {EMBEDDING}")
    settings = {
        "hidden_size": hidden,
        "num_hidden_layers": whole("block_count", most=len(found)),  # each has some tensors
        "intermediate_size": whole("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": whole("attention.head_count_kv", heads, most=heads),
        "rms_norm_eps": float(value("attention.layer_norm_rms_epsilon")),
    }
    scaling = None
    if not faults:
        try:
            divisors = found.get(rope.FREQUENCIES)
            if divisors is not None:
                divisors = np.array(divisors.data, dtype=np.float32)
            scaling = rope.scaling(values, architecture, divisors, head, base)
        except CheckpointError as error:
            faults += str(error).splitlines()
    if faults:
        raise CheckpointError("\n".join(faults))
    cls = {"llama": LlamaConfig, "qwen2": Qwen2Config}[architecture]
    return cls(
        **settings,
        architectures=[ARCHITECTURES[architecture]],
        vocab_size=rows,
        head_dim=head,
        max_position_embeddings=context,
        rope_theta=base,
        rope_scaling=scaling,
        tie_word_embeddings=OUTPUT not in found,
    )
