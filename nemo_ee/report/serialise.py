# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Reports to JSON, whose numbers are finite."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from nemo_ee.errors import DataError


def to_json(report: Any, name: str) -> str:
    """Records, mappings and tuples as JSON's objects with string keys and arrays.

    Args:
        report: a dataclass of such values.
        name: for messages.

    Raises:
        DataError: a number is not finite; JSON has no such number. The message names the field.
    """
    return json.dumps(_plain(report, name), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: _plain(getattr(value, field.name), f"{where}.{field.name}") for field in fields}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        rule = "must be a finite number; look for the cause in the model or the text"
        raise DataError(f"{where}={value}: {rule}")
    return value
