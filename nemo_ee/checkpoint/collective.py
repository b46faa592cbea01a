# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Writing one ``.nemo`` file with all ranks: each writes weights, rank 0 packs, a failure reaches all."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from nemo_ee.checkpoint import archive
from nemo_ee.errors import CheckpointError
from nemo_ee.files.output import work_folder
from nemo_ee.files.write_errors import write_errors

T = TypeVar("T")


def on_all_ranks(work: Callable[[], T]) -> T:
    """Runs ``work`` on every rank; a failure of one is a failure of all. Collective over the world.

    Raises:
        Exception: on ranks where ``work`` raised, what it raised.
        CheckpointError: on all others; none of them is left waiting.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    result = error = None
    try:
        result = work()
    except Exception as raised:
        error = raised
    errors = gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = [f"rank {rank} failed: {text}" for rank, text in enumerate(errors) if text is not None]
    if failed:
        raise CheckpointError("\n".join(failed))
    return result


def on_rank_zero(work: Callable[[], T]) -> T:
    """Runs ``work`` on rank 0 and gives every rank its (picklable) result. Collective over the world.

    Raises:
        Exception: on rank 0, what ``work`` raised.
        CheckpointError: on all other ranks, if ``work`` raised on rank 0; none of them is left waiting.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    outcome: list = [None, None]
    error: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except BaseException as raised:
            error, outcome[1] = raised, f"{type(raised).__name__}: {raised}"
    dist.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise CheckpointError(f"rank 0 failed: {outcome[1]}")
    return outcome[0]


def gather(value: T) -> list[T]:
    """Every rank's (picklable) value, in the order of ranks. Collective over the world."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def save_archive(
    path: str | os.PathLike, write_weights: Callable[[Path], None], write_rest: Callable[[Path], None]
) -> None:
    """Writes a ``.nemo`` file that replaces ``path`` in one step. Collective over the world.

    Args:
        path: the file; its folder must be visible to all ranks, and has room for the content twice.
        write_weights: called on every rank with the folder for the weights, which does not exist yet.
        write_rest: called on rank 0 with the archive's top folder: configuration, tokenizer and so on.

    Raises:
        OutputError: it cannot be written.
        Exception: whatever went wrong, on every rank; the old file, if any, is intact then.
    """
    path = Path(path).absolute()
    with ExitStack() as stack:  # of the first rank
        staging = Path(on_rank_zero(lambda: str(stack.enter_context(work_folder(path)))))

        def write() -> None:
            with write_errors(path, [staging]):
                write_weights(staging / archive.WEIGHTS_DIRECTORY)

        def finish() -> None:
            with write_errors(path, [staging]):
                write_rest(staging)
                archive.write_archive(staging, path)

        on_all_ranks(write)
        on_rank_zero(finish)
