# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The sha256 of a file."""

import hashlib
from pathlib import Path


def sha256_of(path: str | Path) -> str:
    """Hexadecimal sha256 of a file of any size, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
