# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Fits a model's sharded state dict to the keys and shapes a checkpoint really has."""

from collections.abc import Callable, Collection
from typing import Any

from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)

from nemo_ee.checkpoint.keys import is_extra_state, spellings
from nemo_ee.checkpoint.torch_dist import TorchDistCheckpoint
from nemo_ee.errors import CheckpointError
from nemo_ee.runtime import collective

_NAMED = 5
_ABOVE = ("model.decoder.final_layernorm.", "model.output_layer.")
"""What a truncated model lacks beside the deeper layers, which are stacked with the others."""


def fit_to_checkpoint(
    sharded_state_dict: ShardedStateDict,
    checkpoint: TorchDistCheckpoint,
    skip: Collection[str] = (),
    truncated: bool = False,
    least_rows: Callable[[str], int] = lambda name: 0,
) -> ShardedStateDict:
    """Makes a sharded state dict loadable from a checkpoint that another layer spec or a deeper model wrote.

    - Keys are changed to the spelling that the checkpoint has (fused or separate norms).
    - ``_extra_state`` that the checkpoint lacks is left out; its modules keep what they have.
    - Stacked layers of a truncated model take the checkpoint's depth, so that it loads the first of them.
      Pass ``validate_access_integrity=False`` to the load then: no rank asks for the deeper layers.

    Runs on each rank by itself; no collectives.

    Args:
        sharded_state_dict: flat, as a module returns it. Its tensors are changed in place.
        checkpoint: what there is.
        skip: prefixes of sharded keys to leave out, e.g. ``model.exits.``.
        truncated: the model has fewer layers than the checkpoint, and is meant to.
        least_rows: the model's own name -> how many rows a tensor must have whose rows are padded, so that their number
            may be another than the model's.

    Returns:
        The entries to load, under the model's own keys.

    Raises:
        CheckpointError: the checkpoint lacks a tensor, or has it in another shape: the first few are named.
    """
    tensors, objects = checkpoint.tensors, checkpoint.objects
    fitted: ShardedStateDict = {}
    missing, mismatched = [], []
    for name, entry in sharded_state_dict.items():
        if any(entry.key.startswith(prefix) for prefix in skip):
            continue
        if isinstance(entry, ShardedObject) or is_extra_state(entry.key):
            if entry.key in objects or entry.key in tensors:
                fitted[name] = entry
            elif not is_extra_state(entry.key):
                missing.append(entry.key)
            continue
        key = next((spelling for spelling in spellings(entry.key) if spelling in tensors), None)
        if key is None:
            missing.append(entry.key)
            continue
        entry.key = key
        shape = tuple(tensors[key].size)
        fault = _fit_shapes(entry, shape, truncated, least_rows(name))
        if fault:
            mismatched.append(fault)
        fitted[name] = entry
    _raise_on(checkpoint, missing, mismatched)
    return fitted


def unclaimed(
    fitted: ShardedStateDict, checkpoint: TorchDistCheckpoint, truncated: bool = False
) -> list[str]:
    """The checkpoint's tensors that no rank's model has a place for. Collective over the world.

    A model without a place for them is another model than the one that was saved: without a Qwen2's biases on
    Q, K and V, say, it runs, and computes something else.

    Args:
        fitted: from :func:`fit_to_checkpoint`.
        checkpoint: the one that it was fitted to.
        truncated: the model has neither the deeper layers nor what stands above them, and needs neither.

    Returns:
        Keys, sorted; Transformer Engine's ``_extra_state`` is not counted.
    """
    claimed = {entry.key for entry in fitted.values()}
    left = {
        key
        for key in checkpoint.tensors
        if key not in claimed and not is_extra_state(key) and not (truncated and key.startswith(_ABOVE))
    }
    return sorted(set.intersection(*collective.gather(left)))


def _fit_shapes(entry: Any, shape: tuple[int, ...], truncated: bool, least_rows: int) -> str | None:
    """Deepens a truncated model's stacked layers to the checkpoint's depth; returns what still differs."""
    if truncated and isinstance(entry, ShardedTensorFactory):
        build = entry.build_fn

        def build_deepened(*args):
            parts = build(*args)
            for part in parts if isinstance(parts, list) else parts.values():
                _deepen(part, shape)
            return parts

        entry.build_fn = build_deepened
    if isinstance(entry, ShardedTensorFactory):
        parts = entry.build()
        parts = parts if isinstance(parts, list) else list(parts.values())
    else:
        if truncated:
            _deepen(entry, shape)
        parts = [entry]
    for part in parts:
        wanted = tuple(part.global_shape)
        padded = part.allow_shape_mismatch and shape[1:] == wanted[1:] and shape[:1] >= (least_rows,)
        if not padded and wanted != shape:
            return f"{entry.key}: model {wanted}, checkpoint {shape}"
    return None


def _deepen(tensor: ShardedTensor, shape: tuple[int, ...]) -> None:
    stacked = tensor.prepend_axis_num == 1 and len(shape) == len(tensor.global_shape)
    if stacked and tensor.global_shape[0] < shape[0]:
        tensor.global_shape = (shape[0], *tensor.global_shape[1:])
        tensor.axis_fragmentations = (shape[0], *tensor.axis_fragmentations[1:])


def _raise_on(found: TorchDistCheckpoint, missing: list[str], mismatched: list[str]) -> None:
    if missing:
        raise CheckpointError(
            f"{found.name}: {len(missing)} tensors of the model are not in the checkpoint, first "
            f"{', '.join(missing[:_NAMED])}; load it with the configuration it was saved with"
        )
    if mismatched:
        raise CheckpointError(
            f"{found.name}: {len(mismatched)} tensors have other shapes, first "
            f"{'; '.join(mismatched[:_NAMED])}; load it with the configuration it was saved with"
        )
