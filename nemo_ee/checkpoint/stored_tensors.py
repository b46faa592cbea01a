# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint's tensors one by one, under one name each, however they were stored and sharded."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_ee.checkpoint import archive, keys
from nemo_ee.checkpoint.legacy import read_legacy_weights
from nemo_ee.checkpoint.torch_dist import TorchDistCheckpoint
from nemo_ee.errors import CheckpointError
from nemo_ee.files.scratch import scratch_folder

_STACKED = re.compile(r"^(decoder\.layers\.)(?!\d+\.)(.+)$")
_NEEDED = {archive.CONFIG_NAME, archive.WEIGHTS_DIRECTORY, archive.LEGACY_WEIGHTS_NAME}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is read when it is asked for.

    Attributes:
        shape: of the whole tensor, whatever the sharding.
        dtype: as stored.
        read: returns it, on the CPU.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


@contextmanager
def stored_tensors(path: str | os.PathLike) -> Iterator[dict[str, StoredTensor]]:
    """The tensors of a file, backbone and exits, while the context is open.

    Args:
        path: a ``.nemo`` file, or the directory of an extracted one.

    Yields:
        By canonical key without NeMo's prefix, one layer each: ``decoder.layers.0.…``, ``exits.8.…``. Transformer
        Engine's extra state, optimizer states and rotary frequencies are left out.

    Raises:
        CheckpointError: the checkpoint is damaged, or split by the model-parallel ranks of old NeMo releases.
    """
    with scratch_folder("tensors") as scratch:
        root = archive.extract(path, scratch, want=lambda name: name.split("/")[0] in _NEEDED)
        if (root / archive.WEIGHTS_DIRECTORY).is_dir():
            yield tensors_of(TorchDistCheckpoint(root / archive.WEIGHTS_DIRECTORY, path))
        elif (root / archive.LEGACY_WEIGHTS_NAME).is_file():
            yield _legacy_tensors(root / archive.LEGACY_WEIGHTS_NAME)
        else:
            raise CheckpointError(
                f"{path}: holds neither {archive.WEIGHTS_DIRECTORY}/ nor {archive.LEGACY_WEIGHTS_NAME}; "
                "load it with the TP and PP it was saved with and save it again with NeMo 2.4 to get model_weights/"
            )


def tensors_of(checkpoint: TorchDistCheckpoint) -> dict[str, StoredTensor]:
    """As `stored_tensors`, of a checkpoint that is open. One layer's tensor is read at a time."""

    def entries() -> Iterator[tuple[str, StoredTensor]]:
        for key, entry in checkpoint.tensors.items():
            name, shape, dtype = _name(key), tuple(entry.size), entry.properties.dtype
            if name is None:
                continue
            stacked = _STACKED.match(name)
            if stacked is None:
                yield name, StoredTensor(shape, dtype, lambda key=key: checkpoint.read(key))
                continue
            for layer in range(shape[0]):
                layer_name = f"{stacked[1]}{layer}.{stacked[2]}"
                read = lambda key=key, layer=layer: checkpoint.read(key, first=layer)  # noqa: E731
                yield layer_name, StoredTensor(shape[1:], dtype, read)

    return _collect(entries())


def _legacy_tensors(file: Path) -> dict[str, StoredTensor]:
    """Of a single file, which is memory-mapped."""
    state = read_legacy_weights(file, mmap=True)
    named = ((_name(key), value) for key, value in state.items() if isinstance(value, torch.Tensor))
    return _collect(
        (name, StoredTensor(tuple(value.shape), value.dtype, lambda value=value: value))
        for name, value in named
        if name is not None
    )


def _collect(entries: Iterator[tuple[str, StoredTensor]]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for name, tensor in entries:
        if name in found:
            raise CheckpointError(f"{name} is in the checkpoint under two spellings; save the model again")
        found[name] = tensor
    return found


def _name(key: str) -> str | None:
    """Canonical name without NeMo's ``model.``, or None for what is no weight."""
    if keys.is_extra_state(key) or key.startswith("optimizer") or "rotary_pos_emb" in key:
        return None
    return keys.canonical(key.removeprefix("model.").removeprefix("module."))
