# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Names of files on a script's command line mean what they say, whatever characters are in them.

Hydra reads ``key=value`` by a grammar: ``=``, ``,``, ``(``, ``{``, ``~``, ``#``, quotes and letters beyond ASCII are an
error or mean something else there, and NeMo's own checkpoints have ``=`` in their names. Keys whose values are names
of files are quoted here before Hydra sees them; for other keys an error shows the quoting that works.
"""

import os
import re
import shlex
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from nemo_ee.errors import ConfigError, Fault

_NAMES = {
    "prefix",
    "data_prefix",
    "file_names",
    "files",
    "input",
    "nemo",
    "tokenizer.type",
    "tokenizer.model",
    "prompts.file",
    "prompts.directory",
}
_SUFFIXES = ("_file", "_path", "_ckpt", "_checkpoint", "_dir", "_prefix", "_name_or_path")
_ARGUMENT = re.compile(r"(\+{0,2})([A-Za-z_$][\w.$-]*)=(.*)", re.DOTALL)
_LEAF = re.compile(r"[^\[\]{},:]+")
_SEVERAL_RUNS = {"-m", "--multirun"}


def quote_paths(arguments: Sequence[str]) -> list[str]:
    """The arguments of a script, as Hydra reads them as they were meant.

    What Hydra reads as a quoted text, an escaped one, a list or null stays as it is, so that quoting twice changes
    nothing. ``~/`` in front of a path is the user's home, which shells leave to programs behind a ``=``.

    Raises:
        ConfigError: what is neither the name of a file nor anything that Hydra can read; all such are listed.
    """
    several = bool(_SEVERAL_RUNS & set(arguments))
    result, faults = [], []
    for argument in arguments:
        found = _ARGUMENT.fullmatch(argument)
        if found is None:
            result.append(argument)
            continue
        plus, key, value = found.groups()
        override = _parsed(argument)
        if _names_files(key) and not _means_itself(override, value, several):
            argument = f"{plus}{key}={_quoted(_at_home(value))}"
            if _parsed(argument) is None:
                argument = f"{plus}{key}={_quote(value)}"
        elif override is None:
            working = f"{plus}{key}={_quoted(value)}"
            remedy = "close what it opens" if _parsed(working) is None else f"write {shlex.quote(working)}"
            faults.append(Fault(key, value, "has characters that mean something else to Hydra", remedy))
        result.append(argument)
    if faults:
        raise ConfigError(*faults)
    return result


def _names_files(key: str) -> bool:
    parts = key.split(".")
    return bool({parts[-1], ".".join(parts[-2:])} & _NAMES) or parts[-1].endswith(_SUFFIXES)


def _parsed(argument: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def _means_itself(override: Override | None, value: str, several: bool) -> bool:
    """Whether Hydra reads a path as it was written; numbers, functions and sweeps are not what was written."""
    if override is None or value != value.strip():
        return False
    if override.is_sweep_override():
        return several
    read: Any = override.value()
    return read is None or not isinstance(read, int | float)


def _at_home(value: str) -> str:
    return os.path.expanduser(value) if value.startswith("~") else value


def _quoted(value: str) -> str:
    """The value as one text; in a list or a mapping every part that Hydra cannot read."""
    if value[:1] in ("[", "{"):
        return _LEAF.sub(lambda leaf: leaf[0] if _parsed(f"key={leaf[0]}") else _quote(leaf[0]), value)
    return _quote(value)


def _quote(text: str) -> str:
    return QuotedString(text, Quote.single if '"' in text else Quote.double).with_quotes()
