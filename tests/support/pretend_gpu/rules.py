# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What torch's CUDA kernels accept and wait for, by operation."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

MAY_CROSS = {"copy_", "_foreach_copy_", "set_data"}
"""Between host and device."""

TAKES_SCALARS_OF_THE_HOST = {
    "where",
    "masked_fill",
    "masked_fill_",
    "fill",
    "fill_",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "full",
    "full_like",
    "lerp",
    "lerp_",
    "clamp",
    "clamp_",
    "_foreach_add_",
    "_foreach_mul_",
    "_foreach_div_",
    "result_type",
}
"""Beside the pointwise operations, which all do: a tensor without dimensions is a number to them."""

INDEXED = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
"""Their second argument is a list of indices, which may be on the host."""

PUT = {"index_put", "index_put_", "_index_put_impl_"}
"""torch makes a number that is put on the host, and uploads it."""

WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "allclose",
    "is_nonzero",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
    "bincount",
    "histc",
    "multinomial",
    "_linalg_check_errors",
    "linalg_eigh",
    "_linalg_eigh",
    "linalg_lstsq",
}
"""Their results' sizes, or a check of their input, are read on the host."""

MADE_BY_TORCH = {"linalg_cholesky_ex": "info", "linalg_inv_ex": "info", "linalg_solve_ex": "info"}
"""An argument that torch's C++ makes on what it takes for the tensors' device, and reads on the host afterwards."""


@cache
def mutated(func: Any) -> tuple[tuple[int, str], ...]:
    """Arguments that an operation writes to: position and name."""
    arguments = func._schema.arguments
    return tuple(
        (i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write
    )


@cache
def returned_arguments(func: Any) -> tuple[tuple[int, str] | None, ...]:
    """For each result, the argument that it is, where it is written to and returned."""
    arguments = {
        frozenset(a.alias_info.before_set): (i, a.name)
        for i, a in enumerate(func._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    }
    return tuple(
        arguments.get(frozenset(r.alias_info.before_set)) if r.alias_info and r.alias_info.is_write else None
        for r in func._schema.returns
    )


@cache
def takes_scalars(func: Any) -> bool:
    """Whether a tensor of the host without dimensions may stand beside the device's."""
    return torch.Tag.pointwise in func.tags or name_of(func) in TAKES_SCALARS_OF_THE_HOST


@cache
def is_composed(func: Any) -> bool:
    """Whether an operation is made of others on every device, as `aten.item` is."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@cache
def name_of(func: Any) -> str:
    """Without namespace and overload."""
    return func._schema.name.partition("::")[2]


def tensors_in(args: tuple, kwargs: dict) -> Iterator[Tensor]:
    """All of an operation's arguments, lists of them included."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            for each in value:
                if isinstance(each, Tensor):
                    yield each
                elif isinstance(each, list | tuple):  # c10d's lists of lists
                    yield from (tensor for tensor in each if isinstance(tensor, Tensor))


def argument(position: int, name: str, args: tuple, kwargs: dict) -> Any:
    """Of a call."""
    return args[position] if position < len(args) else kwargs.get(name)


def has_mask(args: tuple) -> bool:
    """Whether an indexed operation has a mask among its indices."""
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])


def selects_by_mask(name: str, args: tuple) -> bool:
    """Whether an indexed operation first has to count what a mask selects."""
    filled = name not in ("index", "_unsafe_index") and args[2].numel() == 1 and len(args[1]) == 1
    return has_mask(args) and not filled  # one value under one mask is filled in
