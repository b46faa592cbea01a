# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Errors that are meant for users: each names what was given, the rule it breaks and what to do instead."""

import json
import re
from dataclasses import dataclass

_WORD = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")
_MEAN_OTHERS = {"null", "true", "false", "nan", "inf"}
"""Words that Hydra takes for no text."""


@dataclass(frozen=True)
class Fault:
    """One broken rule in a configuration.

    Attributes:
        key: dotted key as the user would override it, e.g. ``model.early_exit.layers``.
        value: the value received.
        rule: what the value must satisfy.
        remedy: what to write instead.
    """

    key: str
    value: object
    rule: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.key}={as_written(self.value)}: {self.rule}; {self.remedy}"


def as_written(value: object) -> str:
    """A value as a command line and YAML have it: `null`, `true`, `[a, "b c"]`; text by itself as it is."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(quoted, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_written(key)}: {quoted(item)}" for key, item in value.items()) + "}"
    return str(value)


def quoted(value: object) -> str:
    """A value as `as_written` has it, and text so that Hydra reads it as that text, wherever it stands."""
    if isinstance(value, str) and (not _WORD.fullmatch(value) or value.lower() in _MEAN_OTHERS):
        return json.dumps(value, ensure_ascii=False)
    return as_written(value)


class ConfigError(ValueError):
    """A configuration that cannot be run. Lists every fault found, not only the first.

    Args:
        faults: one or more broken rules.
    """

    def __init__(self, *faults: Fault):
        assert faults, "ConfigError needs at least one fault"
        self.faults = tuple(faults)
        super().__init__("\n".join(str(fault) for fault in faults))


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, hostile, or does not belong to this model."""


class OutputError(RuntimeError):
    """Something cannot be written: the disk is full, there is no permission, another process is writing it."""


class DataError(ValueError):
    """Text or indexed data that cannot be used, e.g. empty or shorter than one sequence."""


class TrainingError(RuntimeError):
    """Training cannot go on: a loss or a weight is no number."""


class GenerationError(ValueError):
    """A generation request that cannot be served, e.g. a prompt beyond the position limit."""


class RankMissingError(RuntimeError):
    """Other processes of the run do not answer: they were killed, stopped or cut off."""


def first_line(error: Exception) -> str:
    """What another package's error says, less its pages of advice; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def printable(error: Exception) -> str:
    """What an error says, fit for a terminal: names from files may have characters that steer it.

    Args:
        error: any; its lines stay lines.
    """
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in str(error))
