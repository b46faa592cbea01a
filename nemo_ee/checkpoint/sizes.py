# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Whether a configuration is that of its weights, before a model is built: a file of a megabyte may claim any size."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_ee.checkpoint.keys import canonical
from nemo_ee.errors import CheckpointError

_LAYER = re.compile(r"decoder\.layers\.(?:(\d{1,7})\.)?(.+)")
_REMEDY = "copy or download the checkpoint again, or give another"
_LEAST_BITS = 2
"""Of a parameter; formats with fewer are not read."""


def check_tensors(config: Mapping, tensors: Mapping[str, Any], name: Any) -> None:
    """Compares what a configuration says with the tensors beside it, which must be there.

    Args:
        config: the checkpoint's own `model` section.
        tensors: what has a `size`, by key, as of `TorchDistCheckpoint`; layers stacked in front or numbered.
        name: of the file, for errors.

    Raises:
        CheckpointError: lists every difference.
    """
    faults = [
        f"{name}: {key}={value}: the weights have {found}; {_REMEDY}"
        for key, value, found in _differences(config, _facts(tensors))
    ]
    if faults:
        raise CheckpointError("\n".join(faults))


def check_bytes(config: Mapping, size: int, name: Any) -> None:
    """Compares a configuration with the size of weights that have not been opened.

    Args:
        config: a `model` section, or what has its keys.
        size: bytes of all weights.
        name: of the file, for errors.

    Raises:
        CheckpointError: no number format is so small.
    """
    layers, hidden, ffn = (config[key] for key in ("num_layers", "hidden_size", "ffn_hidden_size"))
    heads = config["num_attention_heads"]
    width = heads * (config.get("kv_channels") or hidden // heads)
    rows = max(config.get(key) or 0 for key in ("make_vocab_size_divisible_by", "override_vocab_size"))
    least = hidden * (layers * (ffn + width) + rows)
    if least * _LEAST_BITS > 8 * size:
        sizes = (
            f"num_layers={layers}, hidden_size={hidden}, ffn_hidden_size={ffn}, attention of width {width}"
        )
        sizes += f", {rows} rows of the vocabulary" if rows else ""
        raise CheckpointError(
            f"{name}: {sizes}: are at least {least} parameters, and the weights have {size} bytes; {_REMEDY}"
        )


def _facts(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The number of layers, and the shapes of tensors that sizes follow from, one layer's each."""
    facts: dict[str, Any] = {}
    layers = 0
    for key, entry in tensors.items():
        shape = tuple(entry.size)
        plain = canonical(key.removeprefix("model.").removeprefix("module."))
        layer = _LAYER.fullmatch(plain)
        if layer is None:
            facts[plain] = shape
        elif layer[1] is not None:
            layers = max(layers, int(layer[1]) + 1)
            facts[layer[2]] = shape
        elif shape:
            layers = max(layers, shape[0])
            facts[layer[2]] = shape[1:]
    return facts | ({"layers": layers} if layers else {})


def _differences(config: Mapping, facts: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    def matrix(key: str) -> tuple[int, int] | None:
        shape = facts.get(key)
        return shape if shape is not None and len(shape) == 2 else None

    layers, hidden, heads = (config.get(key) for key in ("num_layers", "hidden_size", "num_attention_heads"))
    learned = config.get("position_embedding_type", "learned_absolute") == "learned_absolute"
    for key, tensor, needed in (
        ("hidden_size", "embedding.word_embeddings.weight", True),
        ("encoder_seq_length", "embedding.position_embeddings.weight", learned),
        ("num_layers", "self_attention.linear_proj.weight", True),
        ("num_attention_heads", "self_attention.linear_qkv.weight", True),
        ("ffn_hidden_size", "mlp.linear_fc2.weight", not config.get("num_moe_experts")),
    ):
        if needed and config.get(key) is not None and matrix(tensor) is None:
            yield key, config.get(key), f"no {tensor}"
    if "layers" in facts and layers is not None and layers != facts["layers"]:
        yield "num_layers", layers, f"{facts['layers']} layers"
    embedding, positions = (matrix(f"embedding.{kind}_embeddings.weight") for kind in ("word", "position"))
    if embedding is not None:
        rows, width = embedding
        if hidden is not None and hidden != width:
            yield "hidden_size", hidden, f"a width of {width}"
        for key in ("make_vocab_size_divisible_by", "override_vocab_size"):
            if (config.get(key) or 0) > rows:
                yield key, config.get(key), f"{rows} rows of the vocabulary"
    length = config.get("encoder_seq_length")
    if positions is not None and length is not None and length != positions[0]:
        yield "encoder_seq_length", length, f"{positions[0]} positions"
    second, ffn = matrix("mlp.linear_fc2.weight"), config.get("ffn_hidden_size")
    if second is not None and ffn is not None and ffn != second[1]:
        yield "ffn_hidden_size", ffn, f"MLPs of width {second[1]}"
    if heads is None or hidden is None:
        return
    channels, groups = config.get("kv_channels") or hidden // heads, config.get("num_query_groups") or heads
    projection, queries = (matrix(f"self_attention.linear_{kind}.weight") for kind in ("proj", "qkv"))
    if projection is not None and projection[1] != heads * channels:
        yield "num_attention_heads", heads, f"attention of width {projection[1]}, not {heads} x {channels}"
    elif queries is not None and queries[0] != (heads + 2 * groups) * channels:
        rest = queries[0] // max(channels, 1) - heads
        yield "num_query_groups", groups, f"{rest / 2:g} groups of keys and values"
