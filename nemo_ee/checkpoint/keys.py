# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Names of parameters in GPT checkpoints, whichever layer spec wrote them.

Transformer Engine fuses a norm with the linear layer behind it and names it there
(``self_attention.linear_qkv.layer_norm_weight``); unfused specs name it on the layer
(``input_layernorm.weight``). The fused names are the canonical ones, as in megatron-core's
``sharded_state_dict_keys_map``.
"""

from collections.abc import Container, Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

EXITS_PREFIX = "model.exits."

# unfused name -> fused name; both are followed by "weight" or "bias"
_FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def canonical(key: str) -> str:
    """The fused (Transformer Engine) spelling of a parameter's key."""
    for unfused, fused in _FUSED.items():
        head, found, tail = key.rpartition(unfused)
        if found and tail in ("weight", "bias") and (not head or head.endswith(".")):
            return head + fused + tail
    return key


def spellings(key: str) -> tuple[str, ...]:
    """Every spelling under which a checkpoint may hold ``key``, ``key`` itself first."""
    fused = canonical(key)
    names = [key, fused]
    for unfused, prefix in _FUSED.items():
        head, found, tail = fused.rpartition(prefix)
        if found and tail in ("weight", "bias"):
            names.append(head + unfused + tail)
    return tuple(dict.fromkeys(names))


def respell(state: Mapping[str, T], names: Container[str]) -> dict[str, T]:
    """The same entries, each under the spelling that ``names`` has; under its own where there is none."""
    return {next((s for s in spellings(key) if s in names), key): value for key, value in state.items()}


def is_extra_state(key: str) -> bool:
    """Whether ``key`` is Transformer Engine's non-tensor state (``…._extra_state``, or a shard of it)."""
    return "._extra_state" in key


def is_exit(key: str) -> bool:
    """Whether ``key`` belongs to an exit, with or without NeMo's ``model.`` in front."""
    return key.removeprefix("model.").startswith("exits.")


def exit_layer(key: str) -> int:
    """The layer of the exit that ``key`` (:func:`is_exit`) belongs to."""
    return int(key.removeprefix("model.").split(".")[1])


def exit_layers(names: Iterable[str]) -> tuple[int, ...]:
    """Layers of the exits that ``names`` of tensors belong to, ascending."""
    return tuple(sorted({exit_layer(name) for name in names if is_exit(name)}))
