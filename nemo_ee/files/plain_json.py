# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""JSON files from elsewhere as plain values, within limits."""

import json
import stat
from pathlib import Path
from typing import Any

from nemo_ee.errors import CheckpointError

MOST_BYTES = 2**20
"""A model's `config.json` has a few KiB."""


def load_section(file: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
        CheckpointError: it is no such file, or too large.
    """

    def fault(what: str) -> CheckpointError:
        return CheckpointError(f"{file}: {what}; download it again")

    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise fault("is no plain file")
        if status.st_size > MOST_BYTES:
            raise fault(f"has {status.st_size} bytes, and {MOST_BYTES} are read")
        content = json.loads(file.read_bytes().decode("utf-8"))
    except OSError as error:
        raise fault(f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise fault(f"is no JSON ({error})") from error
    except RecursionError as error:
        raise fault("is nested too deeply") from error
    if not isinstance(content, dict):
        raise fault("holds no JSON object")
    return content
