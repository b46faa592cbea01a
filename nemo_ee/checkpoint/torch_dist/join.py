# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Joins torch_dist checkpoints in one plain process."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from nemo_ee.checkpoint.torch_dist.checkpoint import COMMON, FORMAT, METADATA, TorchDistCheckpoint
from nemo_ee.errors import CheckpointError


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
        mcore.update({key: part.metadata.mcore_data[key] for key in kept})
        renamed: dict[str, str] = {}
        for index, info in part.metadata.storage_data.items():
            if index.fqn not in kept:
                continue
            if info.relative_path not in renamed:
                renamed[info.relative_path] = f"__{number}_{len(renamed)}.distcp"
                shutil.copyfile(part.directory / info.relative_path, directory / renamed[info.relative_path])
            storage[index] = _StorageInfo(renamed[info.relative_path], info.offset, info.length)
    joined = Metadata(state_dict_metadata=entries, storage_data=storage)
    joined.mcore_data = mcore
    (directory / METADATA).write_bytes(pickle.dumps(joined))
    for name in (FORMAT, COMMON):
        shutil.copyfile(parts[0].directory / name, directory / name)
    return directory
