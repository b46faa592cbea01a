# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The sha256 of a file."""

import hashlib
from pathlib import Path


def sha256_of(path: str | Path) -> str:
    """Hexadecimal sha256 of a file of any size."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
