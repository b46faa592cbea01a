# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What megatron-core may unpickle freely: a copy of what was checked, and the data files themselves."""

import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from nemo_ee.checkpoint.torch_dist.checkpoint import COMMON, FORMAT, METADATA, TorchDistCheckpoint
from nemo_ee.files.scratch import scratch_folder


@contextmanager
def handed_over(checkpoint: TorchDistCheckpoint, objects: bool = False) -> Iterator[Path]:
    """A folder to give to megatron-core, which unpickles its metadata and common state without looking.

    They are written anew from what was read and checked when the checkpoint was opened, so it does not matter what
    becomes of the files meanwhile. Tensors are read from the checkpoint's own data files, as weights only.

    Args:
        checkpoint: where the data files lie.
        objects: also the pickled objects; otherwise there are none.

    Raises:
        CheckpointError: an object cannot be trusted.
    """
    with scratch_folder("checkpoint") as folder:
        places = checkpoint.metadata.storage_data.items()
        storage = {index: place for index, place in places if index.offset is not None}
        for name in {place.relative_path for place in storage.values()}:
            os.symlink(checkpoint.directory.absolute() / name, folder / name)
        if objects:
            _write_objects(checkpoint, folder, storage)
        given = set(checkpoint.tensors) | ({*checkpoint.object_keys} if objects else set())
        found = checkpoint.metadata
        entries = {key: entry for key, entry in found.state_dict_metadata.items() if key in given}
        metadata = Metadata(state_dict_metadata=entries, storage_data=storage)
        metadata.mcore_data = {key: said for key, said in found.mcore_data.items() if key in given}
        (folder / METADATA).write_bytes(pickle.dumps(metadata))
        torch.save(checkpoint.common, folder / COMMON)
        (folder / FORMAT).write_text(
            json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
        )
        yield folder


def _write_objects(
    checkpoint: TorchDistCheckpoint, folder: Path, storage: dict[MetadataIndex, _StorageInfo]
) -> None:
    """Writes the pickled objects into a data file of their own, and notes where they lie."""
    name = "objects.distcp"
    while (folder / name).is_symlink():
        name = f"_{name}"
    with open(folder / name, "xb") as file:
        for key in checkpoint.object_keys:
            data = checkpoint.read_object(key)
            storage[MetadataIndex(key)] = _StorageInfo(name, file.tell(), len(data))
            file.write(data)
