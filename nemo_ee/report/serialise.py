# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Reports to plain values for JSON, and back with every field checked."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from nemo_ee.errors import DataError
from nemo_ee.report.schema import VERSION, Report


def report_to_dict(report: Report) -> dict:
    """Plain containers with string keys, ready for ``json.dump``.

    Raises:
        DataError: a number is not finite; JSON has no such number. The message names the field.
    """
    return to_plain(report, "report")


def report_from_dict(values: Mapping) -> Report:
    """The inverse of :func:`report_to_dict`.

    Raises:
        DataError: another version, or a field is missing, unknown or of the wrong type.
    """
    version = values.get("version") if isinstance(values, Mapping) else None
    if version != VERSION:
        raise DataError(
            f"report.version={version}: must be {VERSION}; evaluate again with this version of nemo_ee"
        )
    return _from_plain(Report, values, "report")


def to_plain(value: Any, where: str) -> Any:
    """Records, mappings and tuples to dictionaries and lists with string keys, ready for ``json.dump``.

    Args:
        value: e.g. a dataclass of such values.
        where: its name, for messages.

    Raises:
        DataError: a number is not finite.
    """
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: to_plain(getattr(value, field.name), f"{where}.{field.name}") for field in fields}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, tuple):
        return [to_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(
            f"{where}={value}: must be a finite number; look for the cause in the model or the text"
        )
    return value


def _from_plain(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _from_plain(arguments[0], value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_from_plain(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {
            arguments[0](key): _from_plain(arguments[1], item, f"{where}.{key}")
            for key, item in value.items()
        }
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not (isinstance(kind, type) and isinstance(value, kind)) or isinstance(value, bool):
        raise DataError(
            f"{where}={value!r}: must be {getattr(kind, '__name__', kind)}; the report is damaged"
        )
    return value


def _record(kind: Any, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise DataError(f"{where}={values!r}: must be a record; the report is damaged")
    hints = typing.get_type_hints(kind)
    for name in hints.keys() ^ values.keys():
        state = "is missing" if name in hints else "is not a known field"
        raise DataError(f"{where}.{name}: {state}; the report is damaged or of another version")
    return kind(**{name: _from_plain(hints[name], values[name], f"{where}.{name}") for name in hints})
