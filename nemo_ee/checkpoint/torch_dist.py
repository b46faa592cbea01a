# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Reads and joins torch_dist checkpoints (megatron-core's format of ``model_weights/``) in one plain process.

megatron-core needs process groups and a built model to read such a directory, and unpickles its metadata
and common state freely. Hashing, comparing and merging checkpoints need neither: the metadata is unpickled
with an allow-list of the classes the format consists of, and tensors are loaded one at a time with
``weights_only=True``. A directory that was opened here may be given to megatron-core.

Format: ``torch.distributed.checkpoint.metadata`` of torch 2.13 and
``megatron/core/dist_checkpointing/strategies/torch.py`` of megatron-core 0.13.1.
"""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from nemo_ee.errors import CheckpointError

_METADATA = ".metadata"
_FORMAT = "metadata.json"
_COMMON = "common.pt"
_REMEDY = "copy or download the checkpoint again"

_ALLOWED = {
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


class TorchDistCheckpoint:
    """One torch_dist checkpoint directory, checked on opening.

    Args:
        directory: holds ``metadata.json``, ``.metadata`` and ``*.distcp``.
        name: what errors call it, for a directory that was extracted from a file; None: the directory.
        common: read the common state, too. A training checkpoint's holds classes of NeMo's and Lightning's.

    Raises:
        CheckpointError: the directory is no torch_dist checkpoint, its metadata or common state names classes
            that the format does not consist of, or a data file is missing or too short.
    """

    def __init__(
        self, directory: str | os.PathLike, name: str | os.PathLike | None = None, common: bool = True
    ):
        self.directory, self.name = Path(directory), str(name or directory)
        self.metadata = _load_metadata(self.directory, self.name, common)
        self._places = {
            (index.fqn, tuple(index.offset) if index.offset is not None else None): info
            for index, info in self.metadata.storage_data.items()
        }
        self._check_files()

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Global shape, dtype and chunks of every tensor, by key."""
        found = self.metadata.state_dict_metadata.items()
        return {key: value for key, value in found if isinstance(value, TensorStorageMetadata)}

    @property
    def objects(self) -> set[str]:
        """Keys of the pickled objects (Transformer Engine's ``_extra_state``), without their shard suffix."""
        found = self.metadata.state_dict_metadata.items()
        return {key.split("/shard_")[0] for key, value in found if isinstance(value, BytesStorageMetadata)}

    def read(self, key: str, first: int | None = None) -> torch.Tensor:
        """Assembles one tensor from its chunks, on the CPU.

        Args:
            key: a key of :attr:`tensors`.
            first: reads only ``tensor[first]``, e.g. one layer of stacked layers.

        Returns:
            The global tensor, or its slice, whatever the sharding it was written with.
        """
        entry = self.tensors[key]
        shape = tuple(entry.size) if first is None else tuple(entry.size[1:])
        whole = torch.empty(shape, dtype=entry.properties.dtype)
        filled = 0
        for chunk in entry.chunks:
            start, size = tuple(chunk.offsets), tuple(chunk.sizes)
            if first is not None and not start[0] <= first < start[0] + size[0]:
                continue
            data = self._load_chunk(key, start).reshape(size)
            if first is not None:
                data, start, size = data[first - start[0]], start[1:], size[1:]
            whole[tuple(slice(o, o + n) for o, n in zip(start, size, strict=True))].copy_(data)
            filled += data.numel()
        if filled != whole.numel():
            raise self._fault(f"chunks of {key} cover {filled} of {whole.numel()} elements")
        return whole

    def _load_chunk(self, key: str, offsets: tuple[int, ...]) -> torch.Tensor:
        info = self._places.get((key, offsets))
        if info is None:
            raise self._fault(f"no data for {key} at {offsets}")
        with open(self.directory / info.relative_path, "rb") as file:
            file.seek(info.offset)
            raw = io.BytesIO(file.read(info.length))
        try:
            return torch.load(raw, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise self._fault(f"data of {key} cannot be read ({type(error).__name__})") from error

    def _check_files(self) -> None:
        needed: dict[str, int] = {}
        for info in self.metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise self._fault(f"data file {info.relative_path!r} lies outside the checkpoint")
            needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
        for name, size in needed.items():
            file = self.directory / name
            if not file.is_file():
                raise self._fault(f"data file {name} is missing")
            if file.stat().st_size < size:
                raise self._fault(f"data file {name} has {file.stat().st_size} bytes, {size} expected")

    def _fault(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: {what}; {_REMEDY}")


def join(
    parts: list[TorchDistCheckpoint],
    directory: str | os.PathLike,
    leave: Callable[[str], bool] = lambda key: False,
) -> Path:
    """Writes one checkpoint with the tensors of several, copying their files byte for byte.

    Nothing is deserialised but the metadata, so the memory used does not depend on the model's size.

    Args:
        parts: checkpoints with disjoint keys; common state is taken from the first.
        directory: created; must not exist.
        leave: keys of the first part to leave out.

    Returns:
        ``directory``.

    Raises:
        CheckpointError: two parts hold the same key.
    """
    directory = Path(directory)
    directory.mkdir(parents=True)
    entries, storage, mcore = {}, {}, {}
    for number, part in enumerate(parts):
        found = part.metadata.state_dict_metadata
        kept = {key: value for key, value in found.items() if number or not leave(key)}
        both = entries.keys() & kept.keys()
        if both:
            raise CheckpointError(
                f"{part.directory}: {sorted(both)[0]} is in the base too; give a base without these exits"
            )
        entries.update(kept)
        mcore.update(getattr(part.metadata, "mcore_data", None) or {})
        renamed: dict[str, str] = {}
        for index, info in part.metadata.storage_data.items():
            if index.fqn not in kept:
                continue
            if info.relative_path not in renamed:
                renamed[info.relative_path] = f"__{number}_{len(renamed)}.distcp"
                shutil.copyfile(part.directory / info.relative_path, directory / renamed[info.relative_path])
            info.relative_path = renamed[info.relative_path]
            storage[index] = info
    joined = Metadata(state_dict_metadata=entries, storage_data=storage)
    joined.mcore_data = mcore
    (directory / _METADATA).write_bytes(pickle.dumps(joined))
    for name in (_FORMAT, _COMMON):
        shutil.copyfile(parts[0].directory / name, directory / name)
    return directory


class _PlanStub:
    """Stands for megatron-core's cached save plans, which nothing here reads."""


class _FormatUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) == ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"):
            return _PlanStub
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if name in _ALLOWED.get(module, ()):
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


def _load_metadata(directory: Path, given_name: str, common: bool) -> Metadata:
    def fault(what: str, remedy: str = _REMEDY) -> CheckpointError:
        return CheckpointError(f"{given_name}: {what}; {remedy}")

    for name in (_FORMAT, _METADATA, _COMMON):
        if not (directory / name).is_file():
            raise fault(f"holds no {name}, so it is no complete torch_dist checkpoint")
    try:
        backend = json.loads((directory / _FORMAT).read_text())["sharded_backend"]
    except (ValueError, KeyError, TypeError) as error:
        raise fault(f"{_FORMAT} cannot be read ({type(error).__name__})") from error
    if backend != "torch_dist":
        raise fault(
            f"sharded_backend={backend}: only torch_dist is supported",
            "save the model again with dist_ckpt_format=torch_dist",
        )
    try:
        with open(directory / _METADATA, "rb") as file:
            metadata = _FormatUnpickler(file).load()
    except Exception as error:  # damaged pickles raise almost anything
        raise fault(f"{_METADATA} cannot be trusted or read ({error})") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise fault(f"{_METADATA} describes no checkpoint")
    if not common:
        return metadata
    try:
        with torch.serialization.safe_globals([io.BytesIO]):
            torch.load(directory / _COMMON, map_location="cpu", weights_only=True)
    except Exception as error:
        raise fault(f"{_COMMON} cannot be trusted or read ({error})") from error
    return metadata
