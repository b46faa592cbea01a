# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""NCCL, by gloo: groups asked for by that name take the device's tensors alone."""

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from tests.support.pretend_gpu.tensor import CudaTensor

COLLECTIVES = (
    "isend irecv send recv broadcast all_reduce all_reduce_coalesced reduce all_gather all_gather_into_tensor "
    "_all_gather_base all_gather_coalesced gather scatter reduce_scatter reduce_scatter_tensor _reduce_scatter_base "
    "all_to_all_single all_to_all"
).split()


def patch() -> None:
    """Changes torch.distributed in this process."""
    for name in COLLECTIVES:
        _replace(name, _checked(getattr(c10d, name)))
    init, new_group, object_device = c10d.init_process_group, c10d.new_group, c10d._get_object_coll_device

    @functools.wraps(init)
    def init_process_group(backend: Any = None, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        init(_by_gloo(backend), *args, **kwargs)
        _name(c10d._get_default_group(), backend)

    @functools.wraps(new_group)
    def new(ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        backend = backend or dist.get_backend()
        kwargs.pop("device_id", None)
        if _by_gloo(backend) != backend:
            args = (None, *args[1:])
            kwargs.pop("pg_options", None)
        group = new_group(ranks, timeout, _by_gloo(backend), *args, **kwargs)
        _name(group, backend)
        return group

    @functools.wraps(object_device)
    def get_object_coll_device(group: Any = None) -> str:
        return "cuda" if dist.get_backend(group) == "nccl" else object_device(group)

    _replace("init_process_group", init_process_group)
    _replace("new_group", new)
    _replace("_get_object_coll_device", get_object_coll_device)
    _replace("is_nccl_available", lambda: True)


def _replace(name: str, replacement: Callable) -> None:
    for module in (c10d, dist):
        if hasattr(module, name):
            setattr(module, name, replacement)


def _by_gloo(backend: Any) -> Any:
    return "gloo" if backend is None or "nccl" in str(backend) else backend


def _name(group: Any, backend: Any) -> None:
    """Has the group answer with the name it was asked for by."""
    if backend is not None and "nccl" in str(backend) and group in c10d._world.pg_map:
        c10d._world.pg_map[group] = ("nccl", c10d._world.pg_map[group][1])


def _checked(original: Callable) -> Callable:
    @functools.wraps(original)
    def collective(*args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group") or next((a for a in args if isinstance(a, dist.ProcessGroup)), None)
        if group is not dist.GroupMember.NON_GROUP_MEMBER and dist.get_backend(group) == "nccl":
            for tensor in _tensors((*args, *kwargs.values())):
                if not isinstance(tensor, CudaTensor):
                    raise RuntimeError(
                        f"No backend type associated with device type cpu ({original.__name__})"
                    )
        return original(*args, **kwargs)

    return collective


def _tensors(values: Any) -> Any:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
