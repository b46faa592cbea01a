# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Files of one JSON object a line, read where they lie.

NeMo's own reader (`JSONLMemMapDataset`) writes an index beside the file and reads it ever after, also when the file
has changed meanwhile; here an index is made in memory, in one pass over the bytes.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from nemo_ee.errors import DataError

GZIP = b"\x1f\x8b"
"""What compressed files begin with."""


class JsonLines:
    """The objects of one file; empty lines are passed over, those with a carriage return alone among them.

    Args:
        path: the file.

    Raises:
        DataError: the file is missing, no file, or has no line.
    """

    def __init__(self, path: str):
        self.path = str(path)
        if Path(path).is_dir():
            raise DataError(f"{path}: is a directory; name the files in it")
        if not Path(path).is_file():
            raise DataError(f"{path}: there is no such file; give a file of one JSON object a line")
        if not Path(path).stat().st_size:
            raise DataError(f"{path}: the file is empty; give one JSON object a line")
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        if self._bytes[:2].tobytes() == GZIP:
            raise DataError(f"{path}: is compressed; unpack it with gunzip")
        ends = np.append(np.flatnonzero(self._bytes == ord("\n")), len(self._bytes))
        starts = np.append(0, ends[:-1] + 1)
        returns = self._bytes[np.minimum(starts, len(self._bytes) - 1)] == ord("\r")
        kept = ends > starts + returns
        self._bounds, self._numbers = np.stack([starts, ends], 1)[kept], np.flatnonzero(kept) + 1
        if not len(self._numbers):
            raise DataError(f"{path}: the file has no text; give one JSON object a line")

    def __len__(self) -> int:
        return len(self._numbers)

    def where(self, index: int) -> str:
        """The file and the line of an object, for messages."""
        return f"{self.path}: line {self._numbers[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One object.

        Raises:
            DataError: the line is no JSON object; it names file and line.
        """
        start, end = self._bounds[index]
        try:
            value = json.loads(self._bytes[start:end].tobytes())
        except ValueError as error:
            raise DataError(f"{self.where(index)} is no JSON ({error}); write one JSON object") from error
        if not isinstance(value, dict):
            raise DataError(f"{self.where(index)} is a JSON {type(value).__name__}; write one JSON object")
        return value
