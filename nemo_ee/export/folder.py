# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Writes weights and configurations as a Hugging Face folder; one file of weights is in memory at a time."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from nemo_ee.checkpoint.stored_tensors import StoredTensor
from nemo_ee.errors import CheckpointError, ConfigError, Fault
from nemo_ee.export.tokenizer_folder import ExportedTokenizer
from nemo_ee.modeling.finite import not_finite

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


def dtype_of(weights: Mapping[str, StoredTensor], precision: str | int | None) -> torch.dtype:
    """That of all weights of a folder, integers apart: the one asked for, or the narrowest that holds all as they are
    stored.

    Raises:
        ConfigError: none was asked for, and some are stored in a dtype that folders are not written in.
    """
    if precision is not None:
        return DTYPES[str(precision)]
    stored = {tensor.dtype for tensor in weights.values() if tensor.dtype.is_floating_point}
    if others := stored - set(DTYPES.values()):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
        rule = f"would be that of the checkpoint, which has weights in {names}"
        raise ConfigError(Fault("precision", None, rule, "set precision=32"))
    return functools.reduce(torch.promote_types, stored)


def write_model(
    folder: Path,
    config: Any,
    weights: Mapping[str, StoredTensor],
    tokenizer: ExportedTokenizer,
    max_shard_size: str,
) -> None:
    """Writes all that transformers loads: configurations, tokenizer, weights.

    Args:
        folder: exists.
        config: of transformers; its `torch_dtype` is that of the weights.
        weights: by Hugging Face's names.
        tokenizer: that goes along.
        max_shard_size: of one file of weights, e.g. `5GB`.

    Raises:
        CheckpointError: see `write_weights`.
    """
    from transformers import GenerationConfig

    tokenizer.write(folder)  # which may bring its model's old config.json along
    config.save_pretrained(folder)
    GenerationConfig(**tokenizer.special_tokens()).save_pretrained(folder)
    write_weights(folder, weights, config.torch_dtype, max_shard_size)


def write_weights(
    folder: Path, weights: Mapping[str, StoredTensor], dtype: torch.dtype, max_shard_size: str
) -> None:
    """Writes safetensors, with an index where there are several.

    Args:
        folder: exists.
        weights: by Hugging Face's names; read one file at a time.
        dtype: to cast to; integers stay as they are.
        max_shard_size: of one file, e.g. `5GB`.

    Raises:
        CheckpointError: weights that are no numbers, or too large for the dtype.
    """
    kinds = {name: dtype if w.dtype.is_floating_point else w.dtype for name, w in weights.items()}
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(w.shape, dtype=kinds[name], device="meta") for name, w in weights.items()},
        max_shard_size=max_shard_size,
    )
    for file, names in plan.filename_to_tensors.items():
        shard = {
            name: torch.empty(weights[name].shape, dtype=kinds[name]).copy_(weights[name].read())
            for name in names
        }
        if found := not_finite(shard.items()):
            raise CheckpointError(
                f"{', '.join(found[:3])}: {len(found)} weights hold NaN or infinities in {dtype}; set precision=32, or "
                "get another copy of the checkpoint"
            )
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(_as_others(folder))
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _as_others(folder: Path) -> int:
    """The mode that files get in a folder: safetensors makes its own for their owner alone."""
    return folder.stat().st_mode & 0o666


def write_json(path: Path, values: Any) -> None:
    """Writes JSON as transformers does."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
