# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Answers on disk: a file that grows block by block, which a run that was killed goes on with, and what it becomes."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_ee.data.text_file import parsed, read_text
from nemo_ee.errors import ConfigError, DataError, Fault, as_written
from nemo_ee.files.output import replaced_file, replaced_files
from nemo_ee.files.write_errors import output_error

LARGEST = 2**20
"""Bytes of a file that says how far a run has come."""


@dataclass
class Progress:
    """What is written so far.

    Attributes:
        prompts: that were asked, from the first on.
        answers: of them, those that have text.
        unfinished: of them, those that were cut at the longest length.
        tokens: generated.
        seconds: that generating took, in all runs.
        size: of the file of answers, in bytes; what lies behind it was written by a run that was killed.
    """

    prompts: int = 0
    answers: int = 0
    unfinished: int = 0
    tokens: int = 0
    seconds: float = 0.0
    size: int = 0


class AnswerFiles:
    """The files of one output prefix.

    While answers are written there are `PREFIX.partial.jsonl`, which grows by whole blocks, and
    `PREFIX.partial.json`, which is replaced after each and says how much of the other counts. At the end they become
    `PREFIX_train.jsonl`, `PREFIX_validation.jsonl` and at last `PREFIX.json`, whose presence means that all is there.

    Args:
        prefix: `output_prefix`.
        settings: dotted key -> value of all that answers depend on.

    Raises:
        ConfigError: the files were begun with other settings, or their directory does not exist.
        DataError: they are damaged.
    """

    def __init__(self, prefix: str, settings: Mapping[str, Any]):
        self.settings = json.loads(json.dumps(settings))
        self.train, self.validation = Path(f"{prefix}_train.jsonl"), Path(f"{prefix}_validation.jsonl")
        self.summary = Path(f"{prefix}.json")
        self._answers, self._progress = Path(f"{prefix}.partial.jsonl"), Path(f"{prefix}.partial.json")
        check_prefix(prefix)
        self.complete = self.summary.exists()
        record = self.summary if self.complete else self._progress
        self.progress = self._read(record) if record.exists() else Progress()
        if not self.complete and (there := self._size()) < self.progress.size:
            raise DataError(
                f"{self._answers}: must have {self.progress.size} bytes, has {there}; delete it and "
                f"{self._progress} to begin anew"
            )

    def _read(self, record: Path) -> Progress:
        try:
            content = parsed(read_text(record, LARGEST, "delete it to begin anew"), str(record))
            theirs, progress = content["settings"], Progress(**content["progress"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{record}: is damaged ({error}); delete it to begin anew") from error
        faults = [
            Fault(key, value, f"{record} was begun with {as_written(theirs.get(key))}", REMEDY)
            for key, value in self.settings.items()
            if theirs.get(key) != value
        ]
        if faults:
            raise ConfigError(*faults)
        return progress

    def _size(self) -> int:
        return self._answers.stat().st_size if self._answers.exists() else 0

    def append(self, records: Sequence[Mapping], progress: Progress) -> None:
        """Writes the answers of a block, and then that they count.

        Args:
            records: lines of the file.
            progress: with this block, but for `size`.

        Raises:
            OutputError: they could not be written; what was written before counts.
        """
        try:
            self._append(records, progress)
        except OSError as error:
            raise output_error(self._answers, error, _GO_ON) from error

    def _append(self, records: Sequence[Mapping], progress: Progress) -> None:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with open(self._answers, "ab") as stream:
            stream.truncate(self.progress.size)
            stream.write(text.encode("utf-8"))
            stream.flush()
            os.fsync(stream.fileno())
            progress.size = stream.tell()
        with replaced_file(self._progress) as part:
            part.write_bytes(self._record(progress))
        self.progress = progress

    def publish(self, validation_share: float) -> None:
        """Makes of the answers so far the files for tuning; every so many go to validation.

        Args:
            validation_share: of the answers; at least one, unless it is 0.

        Raises:
            DataError: there are no answers, or none for training.
            OutputError: the files could not be written; the answers are kept.
        """
        lines = (
            self._answers.read_bytes()[: self.progress.size].splitlines(keepends=True) if self._size() else []
        )
        count = max(1, round(validation_share * len(lines))) if validation_share else 0
        if not lines or count == len(lines):
            raise DataError(
                f"{self._answers}: {len(lines)} answers are too few for validation_share={validation_share}; "
                "give more prompts, or more minutes"
            )
        held = {len(lines) * i // count for i in range(count)}
        parts = [
            [line for i, line in enumerate(lines) if i not in held],
            [line for i, line in enumerate(lines) if i in held],
            [self._record(self.progress)],
        ]
        with replaced_files([self.train, self.validation, self.summary]) as files:
            for file, part in zip(files, parts, strict=True):
                if part:
                    file.write_bytes(b"".join(part))
        self.complete = True
        self.clear()

    def clear(self) -> None:
        """Removes what was needed to go on, once all is there."""
        self._answers.unlink(missing_ok=True)
        self._progress.unlink(missing_ok=True)

    def description(self) -> str:
        """What was written, for people."""
        done = self.progress
        speed = f"{done.tokens / done.seconds:.0f} tokens/s" if done.seconds else "no time at all"
        lines = [
            f"{done.answers:,} answers to {done.prompts:,} prompts, {done.tokens:,} tokens, {speed}",
            f"{done.unfinished:,} of them were cut at the longest length",
        ]
        return "\n".join(
            [*lines, *(f"wrote {path}" for path in (self.train, self.validation) if path.exists())]
        )

    def _record(self, progress: Progress) -> bytes:
        record = {"progress": asdict(progress), "settings": self.settings}
        return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode("utf-8")


def check_prefix(prefix: str) -> None:
    """Raises ConfigError if the folder of the files does not exist."""
    if not Path(prefix).absolute().parent.is_dir():
        rule = "its directory does not exist"
        raise ConfigError(Fault("output_prefix", prefix, rule, "create it, or write elsewhere"))


REMEDY = "give that again to go on, or another output_prefix"
_GO_ON = "make room, then give the same command to go on"
