# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint's ``model_config.yaml`` may say, whoever wrote it.

NeMo and Hydra take keys of a configuration for the names of classes and functions, import them and call them. A
checkpoint needs none of them: refused at any depth. Which class is built is our choice and not the file's
(:mod:`nemo_ee.checkpoint.targets`); which tokenizer, is in a list (:mod:`nemo_ee.checkpoint.tokenizer_rules`). Values
that decide what is allocated have types and limits.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig

from nemo_ee.checkpoint import targets, tokenizer_rules
from nemo_ee.errors import CheckpointError
from nemo_ee.files.plain_yaml import walk

REMEDY = "copy or download the checkpoint again, or give another"
_DO_NOT_LOAD = "do not load it; get the file from a source you trust"

INSTANTIATION = frozenset({"_target_", "_args_", "_partial_", "_recursive_", "_convert_", "cls", "params"})
"""Keys that `hydra.utils.instantiate` acts upon; NeMo makes `_target_` of `cls`, and lifts what is in `params`."""

SIZES: Mapping[str, int] = {
    "num_layers": 10_000,
    "hidden_size": 2**20,
    "ffn_hidden_size": 2**24,
    "num_attention_heads": 2**16,
    "num_query_groups": 2**16,
    "kv_channels": 2**16,
    "encoder_seq_length": 2**27,
    "max_position_embeddings": 2**27,
    "make_vocab_size_divisible_by": 2**24,
    "override_vocab_size": 2**27,
    "embedding_rows": 2**27,
    "tensor_model_parallel_size": 2**16,
    "pipeline_model_parallel_size": 2**16,
    "virtual_pipeline_model_parallel_size": 2**16,
    "num_layers_in_first_pipeline_stage": 10_000,
    "num_layers_in_last_pipeline_stage": 10_000,
    "micro_batch_size": 2**31,
    "global_batch_size": 2**31,
}
"""Whole numbers from 1 on -> the largest; far beyond any model, and small enough to reckon with."""
NEEDED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "encoder_seq_length")
"""What no model can be built without."""

_SECTIONS = ("early_exit", "tokenizer", "data", "optim", "base", "mcore_customization_config")
_EXIT_SECTIONS = ("ridge", "tuning", "training", "inference")
_NEVER_NULL = ("tokenizer", "base", *NEEDED)
_SHARES = ("hidden_dropout", "attention_dropout", "ffn_dropout", "rotary_percentage")
_POSITIVE = ("layernorm_epsilon", "rotary_base", "seq_len_interpolation_factor")
_ACTIVATIONS = "gelu geglu reglu swiglu squared-relu fast-geglu fast-swiglu fast-reglu approx-gelu".split()
"""NeMo's, `activation_to_func`."""
_TEXTS = ("normalization", "position_embedding_type", "name")
_SWITCHES = (
    "mcore_gpt",
    "share_embeddings_and_output_weights",
    "bias",
    "qkv_bias",
    "transformer_engine",
    "megatron_amp_O2",
    "sequence_parallel",
    "use_cpu_initialization",
)


def checked(document: Any, name: str) -> dict:
    """A configuration that nothing unlisted can be built from.

    Args:
        document: plain values, as :func:`nemo_ee.files.plain_yaml.load` returns them; changed.
        name: the file, for errors.

    Returns:
        The document. Its ``target`` is one of `targets.KNOWN` or gone, and so is what lets a tokenizer run code.

    Raises:
        CheckpointError: lists every fault, each on a line of its own.
    """
    if not isinstance(document, dict):
        raise CheckpointError(f"{name} is no mapping; give a NeMo checkpoint")
    section = document.get("model", document)
    if not isinstance(section, dict):
        raise CheckpointError(f"{name}: model={shown(section)}: must be a section; {REMEDY}")
    faults = [
        f"{key}: would have a class built or a function called by its name; {_DO_NOT_LOAD}"
        for key, _ in walk(document)
        if key.rpartition(".")[2] in INSTANTIATION
    ]
    faults += [f"{key}={shown(section.get(key))}: {rule}; {REMEDY}" for key, rule in _broken_rules(section)]
    if isinstance(tokenizer := section.get("tokenizer"), dict):
        faults += [f"{key}={shown(value)}: {rule}" for key, value, rule in tokenizer_rules.apply(tokenizer)]
    if faults:
        raise CheckpointError("\n".join(f"{name}: {fault}" for fault in faults[:20]))
    if section.get("target") not in targets.KNOWN:
        section.pop("target", None)
    return document


def require(config: Mapping, name: str) -> None:
    """Raises CheckpointError if a configuration lacks what every model needs.

    Args:
        config: the `model` section that a model is about to be built from.
        name: the file, for errors.
    """
    missing = [key for key in ("tokenizer", *NEEDED) if config.get(key) is None]
    if missing:
        raise CheckpointError(f"{name}: its configuration has no {', '.join(missing)}; {REMEDY}")


def shown(value: Any) -> str:
    """A value in an error, not longer than a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _broken_rules(section: dict) -> list[tuple[str, str]]:
    """Keys of the section whose values break a rule, and the rule."""

    def rules():
        for key, most in SIZES.items():
            yield (
                key,
                lambda v, most=most: _is_whole(v) and 1 <= v <= most,
                f"must be a whole number, 1 to {most}",
            )
        for key in _SECTIONS:
            yield key, lambda v: isinstance(v, dict), "must be a section"
        for key in _SHARES:
            yield key, lambda v: _is_number(v) and 0 <= v <= 1, "must be a number from 0 to 1"
        for key in _POSITIVE:
            yield key, lambda v: _is_number(v) and v > 0, "must be a positive number"
        for key in _TEXTS:
            yield key, lambda v: isinstance(v, str), "must be a text"
        yield "activation", lambda v: v in _ACTIVATIONS, f"must be one of {', '.join(_ACTIVATIONS)}"
        for key in _SWITCHES:
            yield key, lambda v: isinstance(v, bool), "must be true or false"
        yield "init_method_std", lambda v: _is_number(v) and v >= 0, "must be a number, 0 or more"
        yield "precision", lambda v: _is_whole(v) or isinstance(v, str), "must be 16, bf16, 32 or the like"
        yield "early_exit", _is_early_exit, "must have a list of layers, and sections below"
        yield "base", _is_base, "must have a name, a content_hash and a vocab_size"

    return [(key, rule) for key, holds, rule in rules() if not _holds(section, key, holds)]


def _holds(section: dict, key: str, holds: Callable[[Any], bool]) -> bool:
    if key not in section or (section[key] is None and key not in _NEVER_NULL):
        return True
    return holds(section[key])


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < float("inf")


def _is_early_exit(value: Any) -> bool:
    if not isinstance(value, dict):
        return True  # which another rule is about
    layers = value.get("layers")
    heads = value.get("head")
    each = heads if isinstance(heads, list) else [heads]
    parts = all(isinstance(part, dict | None) for part in (*each, *map(value.get, _EXIT_SECTIONS)))
    return parts and (layers is None or (isinstance(layers, list) and all(map(_is_whole, layers))))


def _is_base(value: Any) -> bool:
    if not isinstance(value, dict):
        return True
    texts = [value.get(key) for key in ("name", "content_hash")]
    printable = all(isinstance(text, str) and text.isprintable() for text in texts)
    return printable and _is_whole(value.get("vocab_size"))


def refuse_adapter(path: str | os.PathLike, config: DictConfig) -> None:
    """Raises CheckpointError if ``config`` is that of an exits-only checkpoint."""
    if "base" in config:
        raise CheckpointError(
            f"{path}: holds exits only; restore its base {config.base.name} and load these, or merge the two"
        )
