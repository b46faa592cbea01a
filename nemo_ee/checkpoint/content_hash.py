# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A fingerprint of a checkpoint's backbone: equal weights give equal hashes, however they were stored."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from nemo_ee.checkpoint import archive, keys
from nemo_ee.checkpoint.legacy import read_legacy_weights
from nemo_ee.checkpoint.torch_dist import TorchDistCheckpoint
from nemo_ee.errors import CheckpointError
from nemo_ee.files.scratch import scratch_folder

_STACKED = re.compile(r"^(decoder\.layers\.)(?!\d+\.)(.+)$")
_NEEDED = {archive.CONFIG_NAME, archive.WEIGHTS_DIRECTORY, archive.LEGACY_WEIGHTS_NAME}
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias")


def backbone_content_hash(path: str | os.PathLike) -> str:
    """SHA-256 over the backbone's tensors: canonical key, dtype, shape and bytes, in the order of the keys.

    Exits, optimizer state and Transformer Engine's ``_extra_state`` do not count. Nor do archive bytes, time
    stamps, the sharding (TP, PP, stacked or single layers), the layer spec that named the parameters, or rows
    of zeros that pad the vocabulary. Precision does count: a model cast to bf16 is another base. Memory: one
    layer's tensor at a time for torch_dist; a ``model_weights.ckpt`` is memory-mapped.

    Args:
        path: a ``.nemo`` file, the directory of an extracted one, or a ``model_weights`` directory.

    Returns:
        64 hexadecimal digits.

    Raises:
        CheckpointError: the checkpoint is damaged, or split by the model-parallel ranks of old NeMo releases.
    """
    path = Path(path)
    if path.is_dir() and not (path / archive.CONFIG_NAME).is_file():
        return content_hash_of(TorchDistCheckpoint(path))
    with scratch_folder("hash") as scratch:
        root = archive.extract(path, scratch, want=lambda name: name.split("/")[0] in _NEEDED)
        if (root / archive.WEIGHTS_DIRECTORY).is_dir():
            return content_hash_of(TorchDistCheckpoint(root / archive.WEIGHTS_DIRECTORY, path))
        if (root / archive.LEGACY_WEIGHTS_NAME).is_file():
            return _hash(_legacy_tensors(root / archive.LEGACY_WEIGHTS_NAME))
    raise CheckpointError(
        f"{path}: holds neither {archive.WEIGHTS_DIRECTORY}/ nor {archive.LEGACY_WEIGHTS_NAME}; "
        "load it with the TP and PP it was saved with and save it again with NeMo 2.4 to get model_weights/"
    )


def content_hash_of(
    checkpoint: TorchDistCheckpoint, look_at: Callable[[str, torch.Tensor], None] | None = None
) -> str:
    """`backbone_content_hash` of a checkpoint that is open.

    Args:
        checkpoint: all of its backbone is read.
        look_at: is given every tensor, with its canonical key, while it is in memory.
    """
    return _hash(_torch_dist_tensors(checkpoint), look_at)


def _hash(
    tensors: dict[str, Callable[[], torch.Tensor]], look_at: Callable[[str, torch.Tensor], None] | None = None
) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key]().contiguous()
        if look_at is not None:
            look_at(key, tensor)
        if key in _VOCABULARY:
            tensor = _without_padding(tensor)
        digest.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _without_padding(rows: torch.Tensor) -> torch.Tensor:
    used = rows.reshape(rows.shape[0], -1).ne(0).any(dim=1).nonzero()
    return rows[: int(used[-1]) + 1] if len(used) else rows[:0]


def _torch_dist_tensors(checkpoint: TorchDistCheckpoint) -> dict[str, Callable[[], torch.Tensor]]:
    def entries() -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
        for key, entry in checkpoint.tensors.items():
            name = _backbone_name(key)
            if name is None:
                continue
            stacked = _STACKED.match(name)
            if stacked is None:
                yield name, lambda key=key: checkpoint.read(key)
                continue
            for layer in range(entry.size[0]):
                layer_name = f"{stacked[1]}{layer}.{stacked[2]}"
                yield layer_name, lambda key=key, layer=layer: checkpoint.read(key, first=layer)

    return _collect(entries())


def _legacy_tensors(file: Path) -> dict[str, Callable[[], torch.Tensor]]:
    state = read_legacy_weights(file, mmap=True)
    named = ((_backbone_name(key), value) for key, value in state.items() if isinstance(value, torch.Tensor))
    return _collect((name, lambda value=value: value) for name, value in named if name is not None)


def _collect(entries) -> dict[str, Callable[[], torch.Tensor]]:
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for name, read in entries:
        if name in found:
            raise CheckpointError(f"{name} is in the checkpoint under two spellings; save the model again")
        found[name] = read
    return found


def _backbone_name(key: str) -> str | None:
    """Canonical name without NeMo's ``model.``, or None for what is no backbone weight."""
    if (
        keys.is_exit(key)
        or keys.is_extra_state(key)
        or key.startswith("optimizer")
        or "rotary_pos_emb" in key
    ):
        return None
    return keys.canonical(key.removeprefix("model.").removeprefix("module."))
