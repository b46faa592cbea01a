# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Plain containers, as YAML gives them, to frozen dataclasses: their fields are the schema."""

import dataclasses
import difflib
import shlex
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Self

from nemo_ee.errors import ConfigError, Fault, as_written, quoted

MISSING = "???"
"""How OmegaConf writes a mandatory value that was not given."""
Rule = Callable[[str, Any], Iterable[Fault]]
"""What is wrong with a value of the right type, by its dotted key; stands in the `Annotated` type of a field."""


class Settings:
    """Base of a script's settings: a frozen dataclass that is made of plain values."""

    @classmethod
    def from_dict(cls, values: Mapping) -> Self:
        """Checks plain values (as from YAML) and builds the settings.

        Args:
            values: those that are `MISSING` count as not given.

        Raises:
            ConfigError: listing every unknown key, missing value and value that breaks its rule.
        """
        faults: list[Fault] = []
        settings = build_config(cls, _given(values), "", faults)
        if settings is not None:
            faults += settings.faults()
        if faults:
            raise ConfigError(*faults)
        return settings

    def faults(self) -> Iterable[Fault]:
        """What is wrong with values beside each other, where each has its type."""
        return ()


def _given(values: Mapping) -> dict:
    return {
        key: _given(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value != MISSING
    }


def holds(condition: Callable[[Any], bool], rule: str, remedy: str) -> Rule:
    """The rule that a condition holds."""

    def faults(key: str, value) -> tuple[Fault, ...]:
        shown = list(value) if isinstance(value, tuple) else value
        return () if condition(value) else (Fault(key, shown, rule, remedy),)

    return faults


def choice(*choices: str) -> Rule:
    """The rule that a value is one of the choices."""
    return lambda key, value: () if value in choices else (one_of(key, value, choices),)


Positive = Annotated[int, holds(lambda value: value >= 1, "must be positive", "use 1 or more")]


def one_of(key: str, value, choices: tuple[str, ...]) -> Fault:
    """The fault of a value that is none of the choices; names the nearest."""
    remedy = nearest(value, choices) or f"use {' | '.join(choices)}"
    return Fault(key, value, f"not one of {', '.join(choices)}", remedy)


def nearest(value, choices: Iterable[str]) -> str:
    """A question for the choice that is most like a value; empty where none is."""
    found = difflib.get_close_matches(str(value), list(choices), 1)
    return f"did you mean {found[0]}?" if found else ""


def build_config(kind, raw, key: str, faults: list[Fault]):
    """Builds the frozen dataclass `kind`, nested ones included, from a mapping; None if it cannot be built.

    Args:
        kind: a dataclass whose fields have types, perhaps with rules, and defaults unless they are required.
        raw: plain containers.
        key: dotted name of the section, for messages; may be empty.
        faults: receives unknown keys (with the nearest known one), wrong types, missing values, and broken rules.
    """
    known = {f.name: f for f in dataclasses.fields(kind)}
    if not isinstance(raw, Mapping):
        faults.append(Fault(key, raw, "must be a mapping", f"give {', '.join(known)}"))
        return None
    hints, values, complete = typing.get_type_hints(kind, include_extras=True), {}, True
    for name, value in raw.items():
        path = f"{key}.{name}" if key else str(name)
        if name not in known:
            remedy = nearest(name, known) or f"known keys: {', '.join(known)}"
            faults.append(Fault(path, value, "unknown key", remedy))
            continue
        try:
            values[name] = _convert(hints[name], value, path, faults)
        except _NotBuiltError:
            complete = False
        except _WrongTypeError:
            complete = False
            rule = f"expected {_type_name(hints[name])}, got {type(value).__name__}"
            faults.append(
                Fault(path, value, rule, _of_right_type(hints[name], path, value, known[name].default))
            )
    for name, item in known.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in raw:
            path, complete = f"{key}.{name}" if key else name, False
            faults.append(Fault(path, None, "is required", f"set {path}"))
    return kind(**values) if complete else None


class _WrongTypeError(Exception):
    """A value that is of another type than its field."""


class _NotBuiltError(Exception):
    """A section that cannot be built, whose faults are known."""


def _convert(hint, value, path: str, faults: list[Fault]):
    """Checks `value` against a type hint with its rules; integers pass as floats, lists as tuples.

    Raises:
        _WrongTypeError: it is of another type.
        _NotBuiltError: it is a section, whose faults are known.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        converted = _convert(arguments[0], value, path, faults)
        if converted is not None:
            faults += [fault for rule in arguments[1:] for fault in rule(path, converted)]
        return converted
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            try:
                return _convert(option, value, path, faults)
            except _WrongTypeError:
                continue
    elif origin is tuple and isinstance(value, list | tuple):
        kind = arguments[0]
        numbered = (
            f"{path}[{{}}]" if dataclasses.is_dataclass(kind) else path
        )  # sections are named one by one
        return _all_of(
            [partial(_convert, kind, item, numbered.format(i), faults) for i, item in enumerate(value)]
        )
    elif dataclasses.is_dataclass(hint):
        section = build_config(hint, {} if value is None else value, path, faults)
        if section is None:
            raise _NotBuiltError
        return section
    elif hint is float and is_number(value):
        return float(value)
    elif hint in (Mapping, Sequence) and isinstance(value, hint) and not isinstance(value, str):
        return value
    elif hint in (bool, int, str, type(None)) and isinstance(value, hint):
        if hint is not int or not isinstance(value, bool):
            return value
    raise _WrongTypeError


def _all_of(parts: list[Callable[[], Any]]) -> tuple:
    """What the parts return; all are asked, so that no fault is missed.

    Raises:
        _NotBuiltError: of one of them.
    """
    built, complete = [], True
    for part in parts:
        try:
            built.append(part())
        except _NotBuiltError:
            complete = False
    if not complete:
        raise _NotBuiltError
    return tuple(built)


def _type_name(hint) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_type_name, arguments))
    if origin is tuple:
        return f"a list of {_type_name(arguments[0])}"
    names = {type(None): "null", Mapping: "a mapping", Sequence: "a list"}
    return names.get(hint) or hint.__name__


def _of_right_type(hint, path: str, value, default) -> str:
    """What to write in place of a value of the wrong type: the same as text or as a list, or else the default or an
    example; where a rule forbids them all, what that rule says."""
    kinds, candidates, faults = _kinds(hint), [], []
    if not isinstance(value, Mapping | list | tuple | None):
        candidates += [as_written(value), (value,)]
    candidates += [*([] if default in (None, dataclasses.MISSING) else [default]), *map(_example, kinds)]
    for candidate in candidates:
        broken: list[Fault] = []
        try:
            _convert(hint, candidate, path, broken)
        except (_WrongTypeError, _NotBuiltError):
            continue
        if not broken:
            return f"e.g. {shlex.quote(f'{path}={quoted(candidate)}')}"
        faults += broken
    return faults[0].remedy if faults else f"give {_type_name(hint)}"


def _example(kind) -> Any:
    """A value of a type."""
    if typing.get_origin(kind) is tuple:
        return (_example(_kinds(typing.get_args(kind)[0])[0]),)
    return {int: 1, float: 0.5, bool: True, str: "text", Mapping: {}, Sequence: []}.get(kind)


def _kinds(hint) -> list:
    """The types that a type hint allows."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Annotated:
        return _kinds(arguments[0])
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return [kind for option in arguments for kind in _kinds(option)]
    return [hint]


def is_number(value) -> bool:
    """Whether it is a finite float, or an int that can be one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
