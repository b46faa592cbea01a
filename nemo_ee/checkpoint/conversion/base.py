# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which checkpoint a model's backbone came from."""

import os
from pathlib import Path

from nemo_ee.checkpoint import hash_sidecar
from nemo_ee.checkpoint.content_hash import backbone_content_hash
from nemo_ee.errors import CheckpointError
from nemo_ee.runtime import collective


class BaseCheckpoint:
    """The base of a model: its file and, once asked for, its content hash.

    Args:
        path: the ``.nemo`` file, or extracted directory, that the model was restored from.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._stamp = hash_sidecar.stamp_of(self.path)
        self._hash: str | None = None

    @property
    def name(self) -> str:
        """File name, for people; what counts is the hash."""
        return self.path.name

    def hash_now(self, extracted: str | os.PathLike | None = None) -> str:
        """Reads the hash that is kept beside the file (`hash_sidecar`), or computes it and keeps it there.

        Collective over the world; rank 0 reads.

        Args:
            extracted: a copy of the content, to compute it from.

        Raises:
            CheckpointError: the file has changed or gone since the model was restored from it.
        """

        def compute() -> str:
            now = hash_sidecar.stamp_of(self.path)
            if extracted is None and now != self._stamp:
                raise CheckpointError(
                    f"{self.path}: has changed since the model was restored from it; restore the model again"
                )
            if now is None or now != self._stamp:
                return backbone_content_hash(extracted or self.path)
            if (kept := hash_sidecar.read(self.path, now)) is not None:
                return kept
            settled = hash_sidecar.is_settled(self.path)
            found = backbone_content_hash(extracted or self.path)
            if settled and hash_sidecar.stamp_of(self.path) == now:
                hash_sidecar.write(self.path, now, found)
            return found

        if self._hash is None:
            self._hash = collective.on_first_rank(compute)
        return self._hash

    @property
    def content_hash(self) -> str:
        """See :func:`nemo_ee.checkpoint.content_hash.backbone_content_hash`. Collective at the first call."""
        return self.hash_now()
