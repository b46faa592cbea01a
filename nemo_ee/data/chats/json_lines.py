# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Files of one JSON object a line, read where they lie.

NeMo's own reader (`JSONLMemMapDataset`) writes an index beside the file and reads it ever after, also when the file
has changed meanwhile; here an index is made in memory, in one pass over the bytes. Nor is the file mapped into
memory: where it shrinks meanwhile, a mapped one ends the process.
"""

import json
import os
from typing import Any

import numpy as np

from nemo_ee.data.text_file import (
    LONGEST_LINE,
    check_characters,
    decoded,
    has_halves,
    open_text,
    parsed,
)
from nemo_ee.errors import DataError

_BLOCK = 64 * 2**20


class JsonLines:
    """The objects of one file; empty lines are passed over, those with a carriage return alone among them.

    Args:
        path: the file.

    Raises:
        DataError: the file is missing, no file, has no line, or one that is too long.
    """

    def __init__(self, path: str):
        self.path = str(path)
        self._file = open_text(path)
        first = self._file.tell()
        if os.fstat(self._file.fileno()).st_size == first:
            raise DataError(f"{path}: the file is empty; give one JSON object a line")
        self._bounds, self._numbers = self._index(first)
        if not len(self._numbers):
            raise DataError(f"{path}: the file has no text; give one JSON object a line")
        lengths = self._bounds[:, 1] - self._bounds[:, 0]
        if lengths.max() > LONGEST_LINE:
            where = self.where(int(lengths.argmax()))
            rule = f"has {lengths.max()} bytes, more than {LONGEST_LINE}"
            raise DataError(f"{where} {rule}, and would take too much memory; split or remove it")

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
        start, end = map(int, self._bounds[index])
        where = self.where(index)
        raw = os.pread(self._file.fileno(), end - start, start)
        if len(raw) < end - start:
            raise DataError(f"{where} is gone: the file must not change while it is read; start again")
        line = decoded(raw, where)
        value = parsed(line, where)
        if not isinstance(value, dict):
            raise DataError(f"{where} is a JSON {type(value).__name__}; write one JSON object")
        if has_halves(line):
            check_characters(json.dumps(value, ensure_ascii=False), where)
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _file=open_text(state["path"]))

    def _index(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """[lines, 2] where lines with text begin and end, without line feeds, and [lines] their numbers, from 1."""
        bounds, numbers = [np.empty((0, 2), np.int64)], [np.empty(0, np.int64)]
        start, lines, last = place, 0, 0
        while block := os.pread(self._file.fileno(), _BLOCK, place):
            data = np.frombuffer(block, np.uint8)
            ends = np.flatnonzero(data == ord("\n"))
            if len(ends):
                begins = np.append(start - place, ends[:-1] + 1)
                before = np.where(ends > 0, data[ends - 1], last)
                kept = ends - begins > (before == ord("\r"))
                bounds.append(np.stack([begins, ends], 1)[kept] + place)
                numbers.append(np.flatnonzero(kept) + lines + 1)
                lines, start = lines + len(ends), place + int(ends[-1]) + 1
            last, place = block[-1], place + len(block)
        if place - start > (last == ord("\r")):
            bounds.append(np.array([[start, place]]))
            numbers.append(np.array([lines + 1]))
        return np.concatenate(bounds), np.concatenate(numbers)
