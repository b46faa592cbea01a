# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Plain containers, as YAML gives them, to frozen dataclasses: their fields are the schema."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping

from nemo_ee.errors import ConfigError, Fault

MISSING = "???"
"""How OmegaConf writes a mandatory value that was not given."""


def one_of(key: str, value, choices: tuple[str, ...]) -> Fault:
    """The fault of a value that is none of the choices; names the nearest."""
    nearest = difflib.get_close_matches(str(value), choices, 1)
    remedy = f"did you mean {nearest[0]}?" if nearest else f"use {' | '.join(choices)}"
    return Fault(key, value, f"not one of {', '.join(choices)}", remedy)


def read_settings(kind, values: Mapping, faults_of: Callable[..., Iterable[Fault]]):
    """Checks the plain values of a script's settings, and builds them.

    Args:
        kind: a frozen dataclass, see `build_config`.
        values: as from YAML; those that are `MISSING` count as not given.
        faults_of: what is wrong with settings whose types are right.

    Raises:
        ConfigError: listing every unknown key, missing value and value that breaks its rule.
    """
    faults: list[Fault] = []
    config = build_config(kind, _given(values), "", faults)
    if config is not None:
        faults += faults_of(config)
    if faults:
        raise ConfigError(*faults)
    return config


def _given(values: Mapping) -> dict:
    return {
        key: _given(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value != MISSING
    }


def build_config(kind, raw, key: str, faults: list[Fault]):
    """Builds the frozen dataclass `kind`, nested ones included, from a mapping; None if it cannot be built.

    Args:
        kind: a dataclass whose fields have types, and defaults unless they are required.
        raw: plain containers.
        key: dotted name of the section, for messages; may be empty.
        faults: receives unknown keys (with the nearest known one), wrong types and missing values.
    """
    if not isinstance(raw, Mapping):
        faults.append(
            Fault(
                key, raw, "must be a mapping", f"give {', '.join(f.name for f in dataclasses.fields(kind))}"
            )
        )
        return None
    hints, known = typing.get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    values, before = {}, len(faults)
    for name, value in raw.items():
        path = f"{key}.{name}" if key else str(name)
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, 1)
            remedy = f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(known)}"
            faults.append(Fault(path, value, "unknown key", remedy))
        elif dataclasses.is_dataclass(hints[name]):
            values[name] = build_config(hints[name], {} if value is None else value, path, faults)
        else:
            values[name] = _convert(hints[name], value, path, faults)
    for name, item in known.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in values:
            path = f"{key}.{name}" if key else name
            faults.append(Fault(path, None, "is required", f"set {path}"))
    return kind(**values) if len(faults) == before else None


def _convert(hint, value, path: str, faults: list[Fault]):
    """Checks `value` against a type hint; integers pass as floats, lists as tuples."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if option is float and is_number(value):
            return float(value)
        if option is bool and isinstance(value, bool):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option is str and isinstance(value, str):
            return value
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            item = typing.get_args(option)[0]
            inner: list[Fault] = []
            converted = tuple(_convert(item, v, path, inner) for v in value)
            if not inner:
                return converted
    names = " or ".join(_type_name(option) for option in options)
    faults.append(Fault(path, value, f"expected {names}, got {type(value).__name__}", f"write {names}"))
    return None


def _type_name(option) -> str:
    if option is type(None):
        return "null"
    if typing.get_origin(option) is tuple:
        return f"a list of {typing.get_args(option)[0].__name__}"
    return option.__name__


def is_number(value) -> bool:
    """Whether it is a finite int or float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
