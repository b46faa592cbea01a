# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A corpus is read twice: first to check every record and decide which are kept, then to yield these."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from nemo_ee.data.digest import sha256_of
from nemo_ee.data.text_file import LONGEST_LINE
from nemo_ee.errors import DataError
from nemo_ee.preprocessing.documents import find_input_files, iter_documents


@dataclass(frozen=True)
class Rules:
    """How documents are read, see `iter_documents`.

    Attributes:
        document: what one document of a ``.txt`` file is.
        json_key: the key of the text in JSON records.
        longest: bytes that a document may have.
    """

    document: str
    json_key: str
    longest: int = LONGEST_LINE

    def documents(self, path: Path) -> Iterator[str]:
        """The documents of a file."""
        return iter_documents(path, self.document, self.json_key, self.longest)


@dataclass
class Survey:
    """What the first reading found.

    Attributes:
        files: of the input, in reading order.
        rules: it was read by.
        digests: path to sha256.
        sizes: path to bytes.
        kept: for each record in reading order, whether it counts.
        characters: of the records kept.
        empty: records without text.
        repeated: records whose text came before.
    """

    files: list[Path]
    rules: Rules
    digests: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    kept: list[bool] = field(default_factory=list)
    characters: int = 0
    empty: int = 0
    repeated: int = 0
    _states: dict[Path, tuple[int, ...]] = field(default_factory=dict)

    @property
    def documents(self) -> int:
        """Records kept."""
        return sum(self.kept)

    def note(self, path: Path) -> None:
        """Notes what a file is like before it is read."""
        self._states[path] = _state(path)
        self.sizes[str(path)] = self._states[path][0]

    def finish(self, path: Path) -> None:
        """Takes the digest of a file, once it has been read and is known to be text of a bearable size.

        Raises:
            DataError: it has changed since it was noted.
        """
        try:
            self.digests[str(path)] = sha256_of(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check the file") from error
        self.check_unchanged(path)

    def check_unchanged(self, path: Path) -> None:
        """Raises DataError if a file is no longer what it was when it was noted."""
        if _state(path) != self._states[path]:
            raise DataError(f"{path}: must not change while it is read; start again")


def survey_documents(
    inputs: Sequence[str],
    rules: Rules,
    deduplicate: bool,
    check: Callable[[list[Path]], None] = lambda files: None,
) -> Survey:
    """The first reading: checks every record, drops empty ones and, if asked to, repeated ones.

    Args:
        inputs: paths or glob patterns, as `find_input_files` takes them.
        rules: how to read them.
        deduplicate: keep only the first of records with identical text.
        check: called with the files before they are read.

    Raises:
        DataError: input missing, malformed or without text.
    """
    survey = Survey(find_input_files(inputs), rules)
    check(survey.files)
    seen: set[bytes] = set()
    for path in tqdm(survey.files, unit="file", desc="checking", disable=len(survey.files) < 2):
        survey.note(path)
        for text in rules.documents(path):
            keep = bool(text.strip())
            survey.empty += not keep
            if keep and deduplicate:
                digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
                keep = digest not in seen
                survey.repeated += not keep
                seen.add(digest)
            survey.kept.append(keep)
            survey.characters += len(text) * keep
        survey.finish(path)
    if not any(survey.kept):
        raise DataError(
            f"input={', '.join(inputs)}: must hold text, all of its {len(survey.kept)} documents are "
            "empty; give other files or another json_key"
        )
    return survey


def kept_documents(survey: Survey) -> Iterator[str]:
    """The second reading: the text of each record kept, in order.

    Args:
        survey: of the same input.

    Raises:
        DataError: the input has changed since the survey.
    """
    kept = iter(survey.kept)
    for path in survey.files:
        survey.check_unchanged(path)
        for text in survey.rules.documents(path):
            if next(kept, False):
                yield text
        survey.check_unchanged(path)


def _state(path: Path) -> tuple[int, ...]:
    """Size and time of a file; others after it was written to or replaced."""
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: must not vanish while it is read; start again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the file") from error
    return status.st_size, status.st_mtime_ns
