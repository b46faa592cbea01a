# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Moves weights between a NeMo GPT model and a torch_dist checkpoint, all of them or a part."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensorFactory
from nemo.utils.callbacks.dist_ckpt_io import DistributedCheckpointIO
from torch.distributed.checkpoint.api import CheckpointException

from nemo_ee.checkpoint.exits.exit_tensors import check_token_ids
from nemo_ee.checkpoint.fit import fit_to_checkpoint, unclaimed
from nemo_ee.checkpoint.keys import exit_layer, exit_layers, is_exit, is_extra_state
from nemo_ee.checkpoint.torch_dist import TorchDistCheckpoint, handed_over
from nemo_ee.errors import CheckpointError
from nemo_ee.modeling.finite import not_finite
from nemo_ee.runtime import collective
from nemo_ee.runtime.children import writing_checkpoint

_NEMO_PREFIX = "model."
_NAMED = 3


def save_weights(model: Any, directory: str | os.PathLike, want: Callable[[str], bool] | None = None) -> None:
    """Saves a model's weights. Collective over the world.

    Args:
        model: a NeMo GPT model on megatron-core.
        directory: is created, as torch_dist checkpoint.
        want: keeps the tensors whose sharded key it accepts; all by default.
    """
    state = model.sharded_state_dict()
    if want is not None:
        state = {name: entry for name, entry in state.items() if want(entry.key)}
    with writing_checkpoint():
        DistributedCheckpointIO.from_config(model.cfg, async_save=False).save_checkpoint(
            state, str(directory)
        )


def load_weights(
    model: Any,
    directory: str | os.PathLike | TorchDistCheckpoint,
    skip: Collection[str] = (),
    want: Callable[[str], bool] | None = None,
    validate_access_integrity: bool = True,
    state: ShardedStateDict | None = None,
    partial: bool = False,
    may_leave: Callable[[str], bool] | None = None,
    name: str | os.PathLike | None = None,
) -> None:
    """Loads weights into a built model, in place. Collective over the world.

    Any layer spec's names fit, any TP and PP, and a truncated model takes the first layers. Pickled objects
    (``_extra_state``) are loaded for FP8 models only.

    Args:
        model: a NeMo GPT model on megatron-core.
        directory: a torch_dist checkpoint.
        skip: prefixes of sharded keys that keep their initial values.
        want: loads only sharded keys it accepts; all by default.
        validate_access_integrity: megatron-core's check that the ranks together ask for every tensor once.
        state: what to load, if not the model's ``sharded_state_dict()``.
        partial: load just this, read directly, as for truncated models: in one process megatron-core's loader
            cannot load some layers of a stack.
        may_leave: accepts keys of the checkpoint that the model need not have a place for; none by default.
        name: what errors call the checkpoint; None: its directory.

    Raises:
        CheckpointError: on every rank, if a tensor of the model is missing, has another shape or NaN, or the model
            has no place for one of the checkpoint. The model is unchanged then.
    """
    checkpoint = directory
    if not isinstance(directory, TorchDistCheckpoint):
        checkpoint = TorchDistCheckpoint(directory, name)
    modules = model.get_model_module_list()
    assert len(modules) == 1, "interleaved pipelines are refused when the model is built"
    module = modules[0]
    state = model.sharded_state_dict() if state is None else state
    fp8 = has_fp8_state(model)
    wanted = {
        name: entry
        for name, entry in state.items()
        if (want is None or want(entry.key)) and (fp8 or not is_extra_state(entry.key))
    }
    truncated = getattr(module, "truncated", False)
    fitted = collective.on_all_ranks(
        lambda: fit_to_checkpoint(wanted, checkpoint, skip, truncated, least_rows(module))
    )
    if not partial:
        _refuse_unclaimed(unclaimed(fitted, checkpoint, truncated), may_leave, checkpoint.name)
    stored = {name.removeprefix(_NEMO_PREFIX): entry.key for name, entry in fitted.items()}
    if partial or truncated:
        tensors = {name: entry for name, entry in fitted.items() if not isinstance(entry, ShardedObject)}
        loaded = collective.on_all_ranks(
            lambda: {name: read_shard(entry, checkpoint) for name, entry in tensors.items()}
        )
    else:
        read = set(stored.values())
        collective.on_first_rank(lambda: checkpoint.check_stored_sizes(read.__contains__))
        with handed_over(checkpoint, objects=fp8) as folder, damage_named(checkpoint):
            loaded = DistributedCheckpointIO.from_config(model.cfg).load_checkpoint(
                str(folder),
                sharded_state_dict={"state_dict": fitted},
                strict=True,
                validate_access_integrity=validate_access_integrity,
            )["state_dict"]
    values = {name.removeprefix(_NEMO_PREFIX): value for name, value in loaded.items()}
    check_values(module, values, checkpoint.name, stored)
    left_out = {name.removeprefix(_NEMO_PREFIX) for name in state.keys() - fitted.keys()}
    result = module.load_state_dict(values, strict=False)
    missing = [
        name
        for name in result.missing_keys
        if not partial
        and want is None
        and name not in left_out
        and not is_extra_state(name)
        and not is_exit(name)
    ]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"{checkpoint.name}: missing {missing[:5]}, unexpected {result.unexpected_keys[:5]}; "
            "load it with the configuration it was saved with"
        )
    if hasattr(model, "setup_transformer_engine_tp_groups"):
        model.setup_transformer_engine_tp_groups()


def least_rows(module: torch.nn.Module) -> Callable[[str], int]:
    """How many rows of a tensor with rows of padding stand for tokens: the model's own name -> number."""
    vocab_size, early_exit = getattr(module, "true_vocab_size", 0), getattr(module, "early_exit", None)

    def of_tensor(name: str) -> int:
        if is_exit(name) and (head := early_exit.heads[exit_layer(name)]).projection == "shortlist":
            return head.shortlist_size
        return vocab_size

    return of_tensor


@contextmanager
def damage_named(checkpoint: TorchDistCheckpoint) -> Iterator[None]:
    """Around megatron-core's loading: data that cannot be read are an error that names the checkpoint.

    Raises:
        CheckpointError: on every rank, as torch tells all of what one of them found.
    """
    try:
        yield
    except CheckpointException as error:  # no Exception, but a BaseException
        first = next(iter(error.failures.values()))[0]
        raise checkpoint.fault(f"cannot be read ({type(first).__name__}: {str(first)[:300]})") from error


def check_values(
    module: torch.nn.Module,
    values: Mapping[str, Any],
    name: str | os.PathLike,
    stored: Mapping[str, str] | None = None,
) -> None:
    """Checks weights that are about to be loaded into a module. Collective over the world.

    Buffers may hold what they like, but for a shortlist's tokens: others are looked up by them.

    Args:
        module: with `parameters`, and shortlists' vocabulary.
        values: this rank's tensors by their names in the module.
        name: what errors call the file.
        stored: their names in the checkpoint, where these are others.

    Raises:
        CheckpointError: on every rank, naming the tensors that hold NaN or infinities.
    """

    def check() -> None:
        named = dict(module.named_parameters())
        found = not_finite((key, value) for key, value in values.items() if key in named)
        if found:
            shown = ", ".join(f"{(stored or {}).get(key, key)} ({key})" for key in found[:_NAMED])
            raise CheckpointError(
                f"{name}: {len(found)} tensors hold NaN or infinities, first {shown}; get another copy, or train them "
                "again"
            )
        for key, ids in values.items():
            if key.endswith("projection.token_ids"):
                check_token_ids(key, ids, module.true_vocab_size, name)

    collective.on_all_ranks(check)


def check_training_checkpoint(
    module: torch.nn.Module, state: ShardedStateDict, checkpoint: TorchDistCheckpoint
) -> None:
    """Checks that a model has exactly the weights of a checkpoint written while training. Collective.

    Args:
        module: this stage's.
        state: the model's ``sharded_state_dict()``; changed.
        checkpoint: what it holds beside weights (optimizer states, counters) does not count.

    Raises:
        CheckpointError: on every rank, naming the first tensors that only one of the two has.
    """
    mine = sorted(set().union(*collective.gather(exit_layers(entry.key for entry in state.values()))))
    if (theirs := list(exit_layers(checkpoint.tensors))) != mine:
        raise CheckpointError(
            f"model.early_exit.layers={mine}: {checkpoint.name} has exits at {theirs}; set "
            f"'model.early_exit.layers={theirs}', or start another run with name=…"
        )
    fitted = collective.on_all_ranks(
        lambda: fit_to_checkpoint(state, checkpoint, least_rows=least_rows(module))
    )
    _refuse_unclaimed(
        unclaimed(fitted, checkpoint), lambda key: not key.startswith(_NEMO_PREFIX), checkpoint.name
    )


def _refuse_unclaimed(left: list[str], may_leave: Callable[[str], bool] | None, name: str) -> None:
    left = [key for key in left if may_leave is None or not may_leave(key)]
    if not left:
        return
    what = f"{name}: the model has no place for {len(left)} tensors of the checkpoint, first {', '.join(left[:5])}"
    if all(is_exit(key) for key in left):
        remedy = "name these exits in early_exit.layers, or take them out of the file with scripts/edit_early_exits.py"
    else:
        remedy = (
            "restore it with the configuration it was saved with; if this is it, the model is of a kind that "
            "early exits cannot be added to"
        )
    raise CheckpointError(f"{what}; {remedy}")


def has_fp8_state(model: Any) -> bool:
    """Whether ``_extra_state`` is worth loading: it is FP8's scales, and Transformer Engine unpickles it."""
    return bool(model.cfg.get("fp8", False))


def read_shard(entry: Any, checkpoint: TorchDistCheckpoint) -> torch.Tensor:
    """Reads this rank's shard of one tensor, without collectives.

    Args:
        entry: a ShardedTensor, with or without an axis of stacked layers in front, or a factory of such.
        checkpoint: where to read it.
    """
    if isinstance(entry, ShardedTensorFactory):
        return entry.merge_fn([read_shard(part, checkpoint) for part in entry.build()])
    stacked = entry.prepend_axis_num == 1
    whole = checkpoint.read(entry.key, entry.global_offset[0] if stacked else None)
    start = entry.global_offset[entry.prepend_axis_num :]
    shard = whole[tuple(slice(o, o + n) for o, n in zip(start, entry.local_shape, strict=True))]
    if shard.shape == entry.local_shape:
        return shard
    assert entry.allow_shape_mismatch, entry  # only the vocabulary's padding depends on TP
    padded = shard.new_zeros(entry.local_shape)
    padded[tuple(slice(n) for n in shard.shape)] = shard
    return padded
