# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Work whose result, or whose error, all ranks share; without torch.distributed there is one."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch.distributed as dist

from nemo_ee.errors import CheckpointError, ConfigError

T = TypeVar("T")


def on_first_rank(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs ``work`` on a group's first rank; all get its (picklable) result, or raise its error.

    Collectives: a broadcast over the group. None is left waiting where ``work`` fails.

    Args:
        work: not called on other ranks.
        group: None for all ranks.

    Raises:
        BaseException: what ``work`` raised; elsewhere, where that does not pickle, a ConfigError or RuntimeError with
            its text.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return work()
    outcome: list = [None, None]
    error: BaseException | None = None
    if dist.get_rank(group) == 0:
        try:
            outcome[0] = work()
        except BaseException as raised:
            error, outcome[1] = raised, _as_sent(raised)
    dist.broadcast_object_list(outcome, dist.get_process_group_ranks(group)[0], group=group)
    if outcome[1] is not None:
        raise error or outcome[1]
    return outcome[0]


def on_all_ranks(work: Callable[[], T]) -> T:
    """Runs ``work`` on every rank; a failure of one is a failure of all. Collective over the world.

    Raises:
        Exception: on ranks where ``work`` raised, what it raised.
        CheckpointError: on all others; none of them is left waiting.
    """
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


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's (picklable) value, in the order of ranks. Collective over the group; None: over the world."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    values: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _as_sent(error: BaseException) -> BaseException:
    """The error, or its text where it holds what does not pickle: the other ranks wait for one or the other."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301, our own
    except Exception:  # of whatever the error holds
        if isinstance(error, ConfigError):
            return ConfigError(*(replace(fault, value=str(fault.value)) for fault in error.faults))
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
