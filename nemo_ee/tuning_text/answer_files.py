# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Answers on disk: a file that grows block by block, which a run that was killed goes on with, and what it becomes."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_ee.errors import ConfigError, DataError, Fault


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
        if not self.summary.absolute().parent.is_dir():
            rule = "its directory does not exist"
            raise ConfigError(Fault("output_prefix", prefix, rule, "create it, or write elsewhere"))
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
            content = json.loads(record.read_text(encoding="utf-8"))
            theirs, progress = content["settings"], Progress(**content["progress"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{record}: is damaged ({error!r}); delete it to begin anew") from error
        faults = [
            Fault(key, value, f"{record} was begun with {theirs.get(key)}", REMEDY)
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
            DataError: they could not be written; what was written before counts.
        """
        try:
            self._append(records, progress)
        except OSError as error:
            remedy = "make room, then give the same command to go on"
            raise DataError(f"{self._answers}: could not be written ({error.strerror}); {remedy}") from error

    def _append(self, records: Sequence[Mapping], progress: Progress) -> None:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with open(self._answers, "ab") as stream:
            stream.truncate(self.progress.size)
            stream.write(text.encode("utf-8"))
            stream.flush()
            os.fsync(stream.fileno())
            progress.size = stream.tell()
        self._replace(self._progress, self._record(progress))
        self.progress = progress

    def publish(self, validation_share: float) -> None:
        """Makes of the answers so far the files for tuning; every so many go to validation.

        Args:
            validation_share: of the answers; at least one, unless it is 0.

        Raises:
            DataError: there are no answers, or none for training.
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
        parts = {self.train: [line for i, line in enumerate(lines) if i not in held]}
        parts[self.validation] = [line for i, line in enumerate(lines) if i in held]
        for path, part in parts.items():
            path.unlink(missing_ok=True)
            if part:
                self._replace(path, b"".join(part))
        self._replace(self.summary, self._record(self.progress))
        self._answers.unlink()
        self._progress.unlink()
        self.complete = True

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

    @staticmethod
    def _replace(path: Path, content: bytes) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


REMEDY = "give that again to go on, or another output_prefix"
