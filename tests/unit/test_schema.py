# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Plain values become settings, or every fault is named at once: of form, and of rules as far as forms allow."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import pytest

from nemo_ee.errors import ConfigError, Fault
from nemo_ee.schema import Positive, Settings, choice, is_number


def even(key: str, section: "Section") -> list[Fault]:
    return [] if section.count % 2 == 0 else [Fault(f"{key}.count", section.count, "must be even", "use 2")]


@dataclass(frozen=True)
class Section:
    count: Positive = 2
    kind: Annotated[str, choice("red", "green")] = "red"
    share: float = 0.5


@dataclass(frozen=True)
class Example(Settings):
    name: str
    section: Annotated[Section, even] = field(default_factory=Section)
    size: Positive | None = None
    widths: float | tuple[float, ...] = 1.0
    others: Mapping | None = None

    def faults(self):
        return [Fault("name", self.name, "is too short", "write more")] if len(self.name) < 2 else []


def keys_of(values) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        Example.from_dict(values)
    return {fault.key: f"{fault.rule}; {fault.remedy}" for fault in caught.value.faults}


def test_values_get_their_types():
    found = Example.from_dict({"name": "abc", "section": None, "size": "???", "widths": [1, 2], "others": {}})
    assert found == Example("abc", Section(), None, (1.0, 2.0), {})
    assert all(type(width) is float for width in found.widths)


def test_rules_are_reported_beside_unknown_keys_and_missing_values():
    found = keys_of({"size": 0, "section": {"count": 3, "kind": "gren", "shade": 1}})
    assert found == {
        "size": "must be positive; use 1 or more",
        "section.kind": "not one of red, green; did you mean green?",
        "section.shade": "unknown key; did you mean share?",
        "section.count": "must be even; use 2",
        "name": "is required; set name",
    }


def test_rules_beside_each_other_are_asked_of_complete_settings():
    assert keys_of({"name": "a", "size": 0}).keys() == {"name", "size"}
    assert keys_of({"name": "a", "size": "1"}) == {"size": "expected int or null, got str; write int or null"}


@pytest.mark.parametrize(
    ("values", "key", "expected"),
    [
        ({"size": True}, "size", "int or null"),
        ({"size": 1.0}, "size", "int or null"),
        ({"widths": [1, "2"]}, "widths", "float or a list of float"),
        ({"widths": 10**400}, "widths", "float or a list of float"),
        ({"widths": float("nan")}, "widths", "float or a list of float"),
        ({"others": [1]}, "others", "a mapping or null"),
        ({"section": {"share": "0.5"}}, "section.share", "float"),
    ],
)
def test_nothing_is_converted_silently(values, key, expected):
    found = keys_of({"name": "abc", **values})
    assert found.keys() == {key} and found[key].startswith(f"expected {expected}, got ")


def test_numbers_are_finite_as_floats():
    assert is_number(0) and is_number(-1.5) and is_number(2**1000)
    assert not any(map(is_number, (True, "1", None, float("inf"), float("nan"), 10**400)))
