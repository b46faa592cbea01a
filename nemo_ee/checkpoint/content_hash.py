# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A fingerprint of a checkpoint's backbone: equal weights give equal hashes, however they were stored."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from nemo_ee.checkpoint import archive, keys
from nemo_ee.checkpoint.stored_tensors import StoredTensor, stored_tensors, tensors_of
from nemo_ee.checkpoint.torch_dist import TorchDistCheckpoint

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
    with stored_tensors(path) as tensors:
        return _hash(tensors)


def content_hash_of(
    checkpoint: TorchDistCheckpoint, look_at: Callable[[str, torch.Tensor], None] | None = None
) -> str:
    """`backbone_content_hash` of a checkpoint that is open.

    Args:
        checkpoint: all of its backbone is read.
        look_at: is given every tensor, with its canonical key, while it is in memory.
    """
    return _hash(tensors_of(checkpoint), look_at)


def _hash(
    tensors: Mapping[str, StoredTensor], look_at: Callable[[str, torch.Tensor], None] | None = None
) -> str:
    digest = hashlib.sha256()
    for key in sorted(key for key in tensors if not keys.is_exit(key)):
        tensor = tensors[key].read().contiguous()
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
