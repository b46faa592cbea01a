# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which tensors exits must have, in which shapes: known from their configuration and their base, without a model."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from nemo_ee.checkpoint import keys
from nemo_ee.checkpoint.torch_dist import TorchDistCheckpoint
from nemo_ee.config import EarlyExitConfig, HeadConfig, parse_early_exit
from nemo_ee.errors import CheckpointError, ConfigError
from nemo_ee.modeling.finite import not_finite

_NAMED = 3
_LAYERS = "model.decoder.layers."
_FINAL_NORM = "model.decoder.final_layernorm."
_EMBEDDING = "model.embedding.word_embeddings.weight"

Shape = tuple[int, ...]


def check_exits(
    path: str | os.PathLike, config: DictConfig, exits: TorchDistCheckpoint, base: TorchDistCheckpoint
) -> EarlyExitConfig:
    """Checks that a model of this base and configuration could load these exits. Reads all of them.

    Args:
        path: of the exits, for errors.
        config: of the exits.
        exits: their tensors.
        base: the tensors that they were tuned on; its own exits do not count.

    Returns:
        What the configuration says of them.

    Raises:
        CheckpointError: the configuration is bad; a tensor is missing, surplus, of another shape, or holds NaN or
            infinities.
    """
    try:
        section = OmegaConf.to_container(config.early_exit, resolve=True)
        early_exit = parse_early_exit(section, config.num_layers, config.base.vocab_size)
    except ConfigError as error:
        raise CheckpointError("\n".join(f"{path}: {fault}" for fault in error.faults)) from error
    wanted = _wanted(early_exit, _shapes(base), config.base.vocab_size, base.name)
    found = _shapes(exits)
    other = [
        f"{key}: {list(found[key])} where the base asks for {list(shape)}"
        for key, shape in wanted.items()
        if key in found and not _fits(found[key], shape)
    ]
    for what, names in (
        ("lacks", [key for key in wanted if key not in found]),
        ("has beyond its exits", [key for key in found if key not in wanted]),
        ("has in other shapes", other),
    ):
        if names:
            raise CheckpointError(
                f"{path}: {what} {len(names)} tensors, first {', '.join(names[:_NAMED])}; use exits as "
                "save_exits wrote them"
            )
    _check_elements(path, exits, config.base.vocab_size)
    return early_exit


def check_token_ids(key: str, ids: Any, vocab_size: int, name: str | os.PathLike) -> None:
    """Raises CheckpointError unless a shortlist's tokens [k] ascend, are distinct and belong to the vocabulary."""
    good = ids.ndim == 1 and ids.dtype == torch.long and ids.numel() > 0
    if not (good and bool((ids[1:] > ids[:-1]).all()) and 0 <= int(ids[0]) and int(ids[-1]) < vocab_size):
        raise CheckpointError(
            f"{name}: {key} must name distinct tokens of {vocab_size}, ascending; get another copy, or train it again"
        )


def _check_elements(path: str | os.PathLike, exits: TorchDistCheckpoint, vocab_size: int) -> None:
    bad = []
    for key in exits.tensors:
        value = exits.read(key)
        bad += not_finite([(key, value)])
        if key.endswith(".projection.token_ids"):
            check_token_ids(key, value, vocab_size, path)
    if bad:
        raise CheckpointError(
            f"{path}: {len(bad)} tensors hold NaN or infinities, first {', '.join(bad[:_NAMED])}; get another copy, or "
            "train them again"
        )


def _fits(found: Shape, wanted: Shape) -> bool:
    """Whether shapes are equal; a negative number stands for at least as many rows, which are padded for TP."""
    return len(found) == len(wanted) and all(
        mine == theirs or (theirs < 0 and mine >= -theirs) for mine, theirs in zip(found, wanted, strict=True)
    )


def _shapes(checkpoint: TorchDistCheckpoint) -> dict[str, Shape]:
    """By canonical key."""
    found = checkpoint.tensors.items()
    return {keys.canonical(key): tuple(entry.size) for key, entry in found if not keys.is_extra_state(key)}


def _wanted(
    early_exit: EarlyExitConfig, base: Mapping[str, Shape], vocab_size: int, name: str
) -> dict[str, Shape]:
    """Canonical key -> shape. What an exit has of the backbone's kind has the shapes that it has there."""
    layer = _layer_shapes(base)
    norm = {
        key.removeprefix(_FINAL_NORM): shape for key, shape in base.items() if key.startswith(_FINAL_NORM)
    }
    if len(embedding := base.get(_EMBEDDING, ())) != 2 or embedding[0] < vocab_size:
        raise CheckpointError(
            f"{name}: has no embedding of {vocab_size} tokens; give the base that these exits name"
        )
    return {
        f"{keys.EXITS_PREFIX}{n}.{name}": shape
        for n, head in early_exit.heads.items()
        for name, shape in _head_shapes(head, layer, norm, embedding[1], vocab_size).items()
    }


def _head_shapes(
    head: HeadConfig, layer: Mapping[str, Shape], norm: Mapping[str, Shape], hidden: int, vocab_size: int
) -> dict[str, Shape]:
    """Of one exit, from those of a transformer layer and of the final norm."""
    shapes: dict[str, Shape] = {}
    if head.block:
        shapes |= {f"block.{name}": shape for name, shape in layer.items()}
    if head.mlp != "none":
        shapes |= {f"mlp.norm.{name}": shape for name, shape in norm.items()}
        shapes |= {
            f"mlp.{name}": shape
            for name, shape in layer.items()
            if name.startswith("mlp.") and ".layer_norm_" not in name
        }
    if head.norm:
        shapes |= {f"norm.{name}": shape for name, shape in norm.items()}
    if head.linear:
        shapes |= {"linear.weight": (hidden, hidden), "linear.bias": (hidden,)}
    if head.projection == "untied":
        shapes["projection.weight"] = (-vocab_size, hidden)
    if head.projection == "shortlist":
        kept = head.shortlist_size
        shapes |= {"projection.weight": (-kept, hidden), "projection.token_ids": (kept,)}
        shapes |= {"projection.bucket_weight": (hidden,), "projection.bucket_bias": (1,)}
    return shapes


def _layer_shapes(base: Mapping[str, Shape]) -> dict[str, Shape]:
    """Of one transformer layer, whether the checkpoint has layers stacked or one by one."""
    shapes = {}
    for key, shape in base.items():
        if key.startswith(_LAYERS):
            number, _, name = key.removeprefix(_LAYERS).partition(".")
            if number == "0":
                shapes[name] = shape
            elif not number.isdecimal():
                shapes[f"{number}.{name}"] = shape[1:]
    return shapes
