# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which checkpoint a model's backbone came from."""

import os
from pathlib import Path

from nemo_ee.checkpoint import collective
from nemo_ee.checkpoint.content_hash import backbone_content_hash
from nemo_ee.errors import CheckpointError


class BaseCheckpoint:
    """The base of a model: its file and, once asked for, its content hash.

    Args:
        path: the ``.nemo`` file, or extracted directory, that the model was restored from.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._stamp = _stamp(self.path)
        self._hash: str | None = None

    @property
    def name(self) -> str:
        """File name, for people; what counts is the hash."""
        return self.path.name

    def hash_now(self, extracted: str | os.PathLike | None = None) -> str:
        """Computes the hash, from an extracted copy if there is one. Collective over the world; rank 0 reads.

        Raises:
            CheckpointError: the file has changed or gone since the model was restored from it.
        """

        def compute() -> str:
            if extracted is None and _stamp(self.path) != self._stamp:
                raise CheckpointError(
                    f"{self.path}: has changed since the model was restored from it; restore the model again"
                )
            return backbone_content_hash(extracted or self.path)

        if self._hash is None:
            self._hash = collective.on_rank_zero(compute)
        return self._hash

    @property
    def content_hash(self) -> str:
        """See :func:`nemo_ee.checkpoint.content_hash.backbone_content_hash`. Collective at the first call."""
        return self.hash_now()


def _stamp(path: Path) -> tuple[int, int] | None:
    if not path.exists():
        return None
    status = path.stat()
    return status.st_size, status.st_mtime_ns
