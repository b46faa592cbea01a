# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The pickles of a torch_dist checkpoint, read with lists of what they may name; everything else is refused."""

import io
import pickle
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import PosixPath
from typing import Any

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

from nemo_ee.runtime.unpickling import refuse_bytearrays

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


def load_metadata(data: bytes) -> Metadata:
    """Unpickles ``.metadata``.

    Raises:
        Exception: almost any, for a damaged pickle; UnpicklingError for one that names anything else.
    """
    with _unchanged_classes():
        # which reads no more than there is, whatever lengths it says
        found = _FormatUnpickler(io.BytesIO(data)).load()
    if type(found) is not Metadata:
        raise pickle.UnpicklingError("it describes no checkpoint")
    return found


def load_state(data: bytes) -> Any:
    """Loads what `torch.save` wrote: common state, or one of the pickled objects.

    Raises:
        Exception: almost any, for damaged data; UnpicklingError for data that names other classes than honest
            checkpoints of training consist of, or for tensors with more elements than it has bytes for.
    """
    with torch.serialization.safe_globals(_STATE):
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    for leaf in tree_leaves(found):
        if isinstance(leaf, torch.Tensor | torch.UntypedStorage | torch.TypedStorage):
            storage = leaf.untyped_storage() if hasattr(leaf, "untyped_storage") else leaf
            if storage.nbytes() > len(data):
                raise pickle.UnpicklingError(f"a tensor of {storage.nbytes()} bytes in {len(data)}")
    return found


@contextmanager
def _unchanged_classes() -> Iterator[None]:
    """Undoes what a pickle does to the classes that it may name: it can set attributes of them as of objects.

    Raises:
        pickle.UnpicklingError: it did.
    """
    kinds = {getattr(sys.modules[module], name) for module, names in _FORMAT.items() for name in names}
    before = {kind: dict(vars(kind)) for kind in kinds if isinstance(kind, type)}
    try:
        yield
    finally:
        changed = [kind for kind, said in before.items() if dict(vars(kind)) != said]
        for kind in changed:
            for name in vars(kind).keys() - before[kind].keys():
                delattr(kind, name)
            for name, value in before[kind].items():
                if vars(kind).get(name) is not value:
                    setattr(kind, name, value)
    if changed:
        raise pickle.UnpicklingError(f"it changes {changed[0].__name__}")


class _PlanStub:
    """Stands for megatron-core's cached save plans, which nothing here reads."""


class _FormatUnpickler(pickle.Unpickler):
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
