# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Names of files on a script's command line mean what they say, whatever characters are in them.

Hydra reads ``key=value`` by a grammar: ``=``, ``,``, ``(``, ``{``, ``~``, ``#``, quotes and letters beyond ASCII are an
error or mean something else there, and NeMo's own checkpoints have ``=`` in their names. Keys whose values are names
of files are quoted here before Hydra sees them; for other keys an error shows the quoting that works.
"""

import difflib
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from nemo_ee.errors import ConfigError, Fault
from nemo_ee.runtime.commands import CONF

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
_OPEN = {"edit_early_exits": ("early_exit", "moves")}
"""File in conf/ -> its sections that take further keys; of others `trainer` alone."""


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


def check_keys(name: str, words: Sequence[str] | None = None) -> None:
    """Checks that a file in conf/ has the keys on a script's command line.

    Hydra itself says of one that the file lacks no more than that, and accepts any behind a `+`. Values are not looked
    at, and below a section neither is what a `+` adds: that is the settings' own.

    Args:
        name: of the file.
        words: what stands behind the script's name; None takes the command line's.

    Raises:
        ConfigError: listing every key that is unknown.
    """
    words = sys.argv[1:] if words is None else words
    listed, faults, added = listed_values(name), [], set()
    for override in overrides_of(words):
        given = None if override.is_delete() else override.value()
        if override.is_sweep_override():
            given = override.input_line.partition("=")[2]
        for key, value in _leaves(override.key_or_group, given, listed):
            section, _, below = key.partition(".")
            if override.is_add() or override.is_force_add():
                if (below and section in listed) or any(_refers(word, key) for word in words):
                    added.add(key)  # the settings' own, or meant for other values
            if not is_listed(listed, key) and key not in added:
                shown = f"~{key}" if override.is_delete() else key
                remedy = _nearest(key, override.input_line, listed, name)
                faults.append(Fault(shown, value, "unknown key", remedy))
    if faults:
        raise ConfigError(*faults)


def _refers(word: str, key: str) -> bool:
    """Whether an interpolation in a word reads a key, or one below it."""
    return "${" in word and re.search(rf"[{{\s:.]{re.escape(key)}\s*[}}.,]", word) is not None


def _leaves(key: str, value: Any, listed: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A key and its value; of a mapping in the place of a section, those below it."""
    if isinstance(value, Mapping) and value and section_of(listed, key) is not None:
        for name, part in value.items():
            yield from _leaves(f"{key}.{name}", part, listed)
    else:
        yield key, value


def _nearest(key: str, line: str, listed: Mapping[str, Any], name: str) -> str:
    above, _, last = key.rpartition(".")
    known = {each: each.rpartition(".") for each in names_of(listed)}
    same = [each for each, parts in known.items() if parts[2] == last.lower()]
    beside = {parts[2]: each for each, parts in known.items() if parts[0] == above}
    near = [beside[each] for each in difflib.get_close_matches(last.lower(), beside, 1)]
    alike = difflib.get_close_matches(key.lower(), known, 1, 0.8) if above and above not in known else []
    if found := same or near or alike:
        return f"did you mean {found[0]}?"
    section = key.partition(".")[0]
    if section in listed and section in _OPEN.get(name, ("trainer",)) and not line.startswith("~"):
        return f"set {shlex.quote('+' + line)}"
    return f"leave it out; see conf/{name}.yaml"


def names_of(listed: Mapping[Any, Any], section: str = "") -> Iterator[str]:
    """Dotted names of the keys of a file, or of a section of one, those of sections among them."""
    for key, value in listed.items():
        yield f"{section}{key}"
        if isinstance(value, Mapping):
            yield from names_of(value, f"{section}{key}.")


def overrides_of(words: Sequence[str]) -> list[Override]:
    """What a command line changes but for Hydra's own settings; nothing where it names a file of its own, whose keys
    are its author's, and where Hydra cannot read it, and says so.
    """
    given = get_args_parser().parse_args(list(words))
    if given.config_name or given.config_path or given.config_dir or given.shell_completion:
        return []
    try:
        overrides = OverridesParser.create().parse_overrides(given.overrides)
    except HydraException:
        return []
    if any(override.key_or_group == "hydra.searchpath" for override in overrides):
        return []
    return [override for override in overrides if re.split("[./]", override.key_or_group)[0] != "hydra"]


def listed_values(name: str) -> dict[str, Any]:
    """What a file in conf/ has but for Hydra's own settings, interpolations as they are."""
    listed = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    return {key: value for key, value in listed.items() if key not in ("defaults", "hydra")}


def is_listed(listed: Any, key: str) -> bool:
    """Whether a file has a key, or the key has a value in it that such keys may be part of."""
    for part in key.split("."):
        if not isinstance(listed, Mapping):
            return True
        if part not in listed:
            return False
        listed = listed[part]
    return True


def section_of(listed: Any, key: str) -> Mapping[str, Any] | None:
    """The section of a file at a key; None where it has none there."""
    for part in key.split("."):
        listed = listed.get(part) if isinstance(listed, Mapping) else None
    return listed if isinstance(listed, Mapping) else None


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
