# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Weights of old NeMo releases: one pickled ``model_weights.ckpt``."""

import io
import os
from pathlib import Path
from typing import Any

import torch

from nemo_ee.checkpoint.torch_dist import pickles, zip_records
from nemo_ee.errors import CheckpointError


def read_legacy_weights(
    file: Path, mmap: bool = False, name: str | os.PathLike | None = None
) -> dict[str, Any]:
    """Reads a state dict without running code from it; byte buffers are Transformer Engine's extra state.

    Args:
        file: a ``model_weights.ckpt``.
        mmap: leave tensors on disk until they are used.
        name: what errors call the file; None: its path.

    Raises:
        CheckpointError: the file is damaged, names classes that weights do not consist of, or holds no state
            dict.
    """
    try:
        zip_records.check_file(str(file))
        pickles.dry_run(str(file))
        with torch.serialization.safe_globals([io.BytesIO]):
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damaged pickles and zip files raise almost anything
        raise CheckpointError(
            f"{name or file}: cannot be trusted or read ({type(error).__name__}); copy it again, or save the model "
            "again with NeMo 2.4 to get model_weights/"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{name or file}: holds no weights by name; give a NeMo checkpoint")
    if not all(isinstance(key, str) for key in state):
        raise CheckpointError(
            f"{name or file}: holds weights whose names are no text; give a NeMo checkpoint"
        )
    return state
