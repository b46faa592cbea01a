# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The pickles of a torch_dist checkpoint, read with lists of what they may name; everything else is refused."""

import io
import pickle
import sys
import zipfile
from collections import defaultdict
from enum import Enum
from pathlib import PosixPath
from typing import Any, BinaryIO

import torch
from omegaconf import (
    AnyNode,
    BooleanNode,
    BytesNode,
    DictConfig,
    FloatNode,
    IntegerNode,
    ListConfig,
    PathNode,
    StringNode,
)
from omegaconf.base import ContainerMetadata
from omegaconf.base import Metadata as ConfigMetadata
from torch.distributed.checkpoint.metadata import Metadata
from torch.utils._pytree import tree_leaves

from nemo_ee.runtime.upstream.unpickling import refuse_bytearrays, unchanged

refuse_bytearrays()

_FORMAT = {
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}
"""What ``.metadata`` may name, by module."""

_STATE: list[Any] = [
    # Transformer Engine's extra state
    io.BytesIO,
    # Lightning's hyper_parameters: the model's configuration, as NeMo's models have it. Loading it resolves nothing
    AnyNode,
    BooleanNode,
    BytesNode,
    ContainerMetadata,
    DictConfig,
    FloatNode,
    IntegerNode,
    ListConfig,
    ConfigMetadata,
    PathNode,
    StringNode,
    Any,
    defaultdict,
    dict,
    int,
    list,
    # of a checkpoint callback
    PosixPath,
]
"""What NeMo and Lightning put into a training checkpoint beside weights, and what that consists of."""
_MOST_HASHED = 1000
"""Parts of a tuple: those of shapes have 8, those of the state of Python's random numbers 625."""


def load_metadata(data: bytes) -> Metadata:
    """Unpickles ``.metadata``.

    Raises:
        Exception: almost any, for a damaged pickle; UnpicklingError for one that names anything else.
    """
    named = (getattr(sys.modules[module], name) for module, names in _FORMAT.items() for name in names)
    with unchanged([kind for kind in named if isinstance(kind, type)]):
        found = _FormatUnpickler(data).load()
    if type(found) is not Metadata:
        raise pickle.UnpicklingError("it describes no checkpoint")
    return found


def load_state(data: bytes) -> Any:
    """Loads what `torch.save` wrote: common state, or one of the pickled objects.

    Raises:
        Exception: almost any, for damaged data; UnpicklingError for data that names other classes than honest
            checkpoints of training consist of, or for tensors with more elements than it has bytes for.
    """
    dry_run(io.BytesIO(data))
    with torch.serialization.safe_globals(_STATE):
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    for leaf in tree_leaves(found):
        if isinstance(leaf, torch.Tensor | torch.UntypedStorage | torch.TypedStorage):
            storage = leaf.untyped_storage() if hasattr(leaf, "untyped_storage") else leaf
            if storage.nbytes() > len(data):
                raise pickle.UnpicklingError(f"a tensor of {storage.nbytes()} bytes in {len(data)}")
    return found


def dry_run(file: BinaryIO | str) -> None:
    """Goes through what `torch.save` wrote without building it; to be done before torch's own reader does.

    Args:
        file: whose directory of records has been checked.

    Raises:
        Exception: almost any, for damaged data; UnpicklingError for data that would take too long to unpickle.
    """
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if name.endswith("/data.pkl"):
                _DryUnpickler(archive.read(name)).load()


class _PlanStub:
    """Stands for megatron-core's cached save plans, which nothing here reads."""


class _WholeReads(io.BytesIO):
    """Gives as many bytes as are asked for, or none: Python's unpickler takes fewer, unlike the one in C."""

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        if size is not None and len(data) < size:
            raise EOFError("it ends too early")
        return data

    def readline(self, size: int | None = -1) -> bytes:
        line = super().readline(size)
        if not line.endswith(b"\n"):
            raise EOFError("it ends too early")
        return line


class _BoundedUnpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Python's own unpickler, not the one in C, which makes room for whatever a length or a place in its memo says.

    A tuple may hold another one twice, and so on: 40 of these in each other, as a key, are hashed for ever. Here
    tuples have at most `_MOST_HASHED` parts, those of their parts included.
    """

    dispatch = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def __init__(self, data: bytes):
        super().__init__(_WholeReads(data))
        self._parts: dict[int, tuple[int, tuple]] = {}

    def _bound(self) -> None:
        made = self.stack[-1]
        if type(made) is not tuple:
            return
        known = (self._parts.get(id(part)) for part in made if type(part) is tuple)
        count = len(made) + sum(found[0] for found in known if found is not None)
        if count > _MOST_HASHED:
            raise pickle.UnpicklingError("it has tuples in each other that nothing honest has")
        self._parts[id(made)] = (count, made)  # which keeps it, so that its id stays its own

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it has an opcode that does not belong to the format")


def _bounded(load: Any) -> Any:
    def load_bounded(unpickler: _BoundedUnpickler) -> None:
        load(unpickler)
        unpickler._bound()

    return load_bounded


for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    _BoundedUnpickler.dispatch[_code[0]] = _bounded(_BoundedUnpickler.dispatch[_code[0]])
for _code in (pickle.BYTEARRAY8, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.FROZENSET):
    _BoundedUnpickler.dispatch[_code[0]] = _BoundedUnpickler._refuse


class _Anything:
    """Stands for every class and function in a dry run."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        """Of lists."""

    def extend(self, _: Any) -> None:
        """Of lists."""

    def add(self, _: Any) -> None:
        """Of sets."""


class _DryUnpickler(_BoundedUnpickler):
    """Builds nothing that a pickle names, to see whether anything else in it takes too long."""

    def find_class(self, _module: str, _name: str) -> Any:
        return _Anything

    def persistent_load(self, _: Any) -> Any:
        return _Anything()


class _FormatUnpickler(_BoundedUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"):
            return _PlanStub
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if name in _FORMAT.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong to the torch_dist format")


def _enum_member(kind: Any, name: str) -> Enum:
    """What Python 3.11.2 pickles as a call of `getattr`; nothing else may be.

    Raises:
        pickle.UnpicklingError: for anything but a member of an allowed enum.
    """
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError("getattr of anything but an enum does not belong to the torch_dist format")
