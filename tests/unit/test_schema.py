# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Plain values become settings, or every fault is named at once: of form, and of rules as far as forms allow."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from nemo_ee.calibration.settings import CalibrationConfig
from nemo_ee.errors import ConfigError, Fault
from nemo_ee.evaluation.settings import EvaluationConfig
from nemo_ee.export.settings import ExportConfig
from nemo_ee.preprocessing.tokenizer_training import TokenizerTrainingConfig
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


@dataclass(frozen=True)
class Required(Settings):
    layers: tuple[int, ...]
    names: tuple[str, ...] | None
    others: Mapping
    several: Sequence
    share: float
    sure: bool | None


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
    assert keys_of({"name": "a", "size": "1"}) == {"size": "expected int or null, got str; e.g. size=1"}


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


WRONG = (
    True,
    77,
    0.5,
    float("nan"),
    "a b",
    "it's",
    "é",
    "null",
    "NaN",
    "</s>",
    [1],
    ["a", None],
    {"a": 1},
    None,
)
KINDS = [Example, Required, ExportConfig, EvaluationConfig, CalibrationConfig, TokenizerTrainingConfig]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_remedy_for_a_wrong_type_gives_the_right_one_when_pasted(kind):
    told = 0
    for key in (item.name for item in fields(kind)):
        for value in WRONG:
            fault = type_fault(kind, key, value)
            if fault is None:
                continue
            told += 1
            if not fault.remedy.startswith("e.g. "):
                continue  # what a rule says, which forbids the like
            (word,) = shlex.split(fault.remedy.removeprefix("e.g. "))
            pasted = OverridesParser.create().parse_override(word)
            assert pasted.key_or_group == key
            assert not [f for f in faults_of(kind, key, pasted.value()) if f.key == key], (key, value, word)
    assert told > 20


def faults_of(kind, key, value) -> tuple[Fault, ...]:
    try:
        kind.from_dict({key: value})
    except ConfigError as error:
        return error.faults
    return ()


def type_fault(kind, key, value) -> Fault | None:
    return next(
        (f for f in faults_of(kind, key, value) if f.key == key and f.rule.startswith("expected ")), None
    )


def test_what_was_meant_is_kept():
    assert keys_of({"name": 7})["name"] == """expected str, got int; e.g. 'name="7"'"""
    with pytest.raises(ConfigError, match=r"^kind=true: expected str, got bool; use base \| draft \| remote"):
        ExportConfig.from_dict({"kind": True, "gpt_model_file": "a", "output_path": "b"})
    with pytest.raises(
        ConfigError, match=r"^engines=vllm: expected a list of str, got str; e.g. 'engines=\[vllm\]'"
    ):
        ExportConfig.from_dict(
            {"kind": "draft", "gpt_model_file": "a", "output_path": "b", "engines": "vllm"}
        )


def test_values_are_shown_as_they_are_written():
    values = {
        "null": None,
        "true": True,
        "[a, 1, null]": ["a", 1, None],
        "{a: false}": {"a": False},
        "a b": "a b",
    }
    values['["", "a b", "null", "it\'s", "é"]'] = ["", "a b", "null", "it's", "é"]
    values["[[1], llama.cpp]"] = ((1,), "llama.cpp")
    for shown, value in values.items():
        assert str(Fault("key", value, "rule", "remedy")) == f"key={shown}: rule; remedy"


def test_numbers_are_finite_as_floats():
    assert is_number(0) and is_number(-1.5) and is_number(2**1000)
    assert not any(map(is_number, (True, "1", None, float("inf"), float("nan"), 10**400)))
