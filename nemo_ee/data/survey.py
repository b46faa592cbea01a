# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A corpus is read twice: first to check every record and decide which are kept, then to yield these."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from nemo_ee.data.digest import sha256_of
from nemo_ee.data.documents import find_input_files, iter_documents
from nemo_ee.errors import DataError


@dataclass
class Survey:
    """What the first reading found.

    Attributes:
        files: of the input, in reading order.
        digests: path to sha256.
        kept: for each record in reading order, whether it counts.
        characters: of the records kept.
        empty: records without text.
        repeated: records whose text came before.
    """

    files: list[Path]
    digests: dict[str, str] = field(default_factory=dict)
    kept: list[bool] = field(default_factory=list)
    characters: int = 0
    empty: int = 0
    repeated: int = 0

    @property
    def documents(self) -> int:
        """Records kept."""
        return sum(self.kept)


def survey_documents(inputs: Sequence[str], document: str, json_key: str, deduplicate: bool) -> Survey:
    """The first reading: checks every record, drops empty ones and, if asked to, repeated ones.

    Args:
        inputs: paths or glob patterns, as `find_input_files` takes them.
        document: as `iter_documents` takes it.
        json_key: likewise.
        deduplicate: keep only the first of records with identical text.

    Raises:
        DataError: input missing, malformed or without text.
    """
    survey = Survey(find_input_files(inputs))
    seen: set[bytes] = set()
    for path in tqdm(survey.files, unit="file", desc="checking", disable=len(survey.files) < 2):
        survey.digests[str(path)] = sha256_of(path)
        for text in iter_documents(path, document, json_key):
            keep = bool(text.strip())
            survey.empty += not keep
            if keep and deduplicate:
                digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
                keep = digest not in seen
                survey.repeated += not keep
                seen.add(digest)
            survey.kept.append(keep)
            survey.characters += len(text) * keep
    if not any(survey.kept):
        raise DataError(
            f"input={', '.join(inputs)}: must hold text, all of its {len(survey.kept)} documents are "
            "empty; give other files or another json_key"
        )
    return survey


def kept_documents(survey: Survey, document: str, json_key: str) -> Iterator[str]:
    """The second reading: the text of each record kept, in order.

    Args:
        survey: of the same input.
        document: as in the survey.
        json_key: likewise.

    Raises:
        DataError: the input has changed since the survey.
    """
    kept = iter(survey.kept)
    for path in survey.files:
        for text in iter_documents(path, document, json_key):
            keep = next(kept, None)
            if keep is None:
                break
            if keep:
                yield text
    if next(kept, None) is not None:
        raise DataError(
            f"input={', '.join(map(str, survey.files))}: must not change while it is read; start again"
        )
