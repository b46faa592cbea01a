# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""`model.early_exit`: what it accepts, and that every fault is named with its key, value, rule and remedy."""

import copy
import dataclasses

import pytest
from omegaconf import OmegaConf

from nemo_ee.config import EarlyExitConfig, HeadConfig, check_thresholds, parse_early_exit
from nemo_ee.errors import ConfigError, Fault, as_written

GOOD = {
    "layers": [6, 12],
    "head": {"block": True, "projection": "untied", "train_projection": True},
    "init": "copy",
    "tuning": {"loss_weights": [1, 0.5], "ce_weight": 1, "token_weighting": "confidence"},
    "inference": {"threshold": [0.5, 1], "exits": None},
}


def changed(**changes) -> dict:
    """`GOOD` with dotted keys (dots as ``__``) replaced."""
    raw = copy.deepcopy(GOOD)
    for path, value in changes.items():
        *parents, name = path.split("__")
        section = raw
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = value
    return raw


def faults_of(raw, num_layers: int = 24, vocab_size: int | None = 1000) -> tuple[Fault, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_early_exit(raw, num_layers, vocab_size)
    for fault in caught.value.faults:
        assert str(fault) in str(caught.value)
        assert str(fault) == f"{fault.key}={as_written(fault.value)}: {fault.rule}; {fault.remedy}"
    return caught.value.faults


def test_values_arrive():
    config = parse_early_exit(GOOD, num_layers=24, vocab_size=1000)
    assert config.layers == (6, 12) and config.head.block and config.head.mlp == "beside"
    assert config.tuning.loss_weights == (1.0, 0.5) and config.inference.threshold == (0.5, 1.0)
    assert [config.loss_weight(n) for n in config.layers] == [1.0, 0.5]


def test_layers_alone_take_all_defaults():
    assert parse_early_exit({"layers": [1]}, 24) == EarlyExitConfig(layers=(1,))
    assert EarlyExitConfig(layers=(1,)).loss_weight(1) == 1.0


def test_stored_and_read_again_it_is_the_same():
    config = parse_early_exit(GOOD, 24, 1000)
    stored = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(config.to_dict())))
    assert parse_early_exit(stored, 24, 1000) == config


def test_it_cannot_be_changed():
    config = parse_early_exit(GOOD, 24)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.layers = (1,)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.head.mlp = "none"


def test_the_given_section_is_not_changed():
    raw = changed()
    parse_early_exit(raw, 24, 1000)
    assert raw == GOOD


@pytest.mark.parametrize(
    ("tuning", "init", "needed"),
    [
        ({"ce_weight": 1.0, "kl_weight": 0.0, "argmax_weight": 0.0}, "copy", False),
        ({"ce_weight": 1.0, "kl_weight": 0.0, "argmax_weight": 0.0}, "random", False),
        ({"ce_weight": 1.0, "kl_weight": 0.0, "argmax_weight": 0.0}, "ridge", True),
        ({"ce_weight": 1.0, "kl_weight": 0.1, "argmax_weight": 0.0}, "copy", True),
        ({"ce_weight": 1.0, "kl_weight": 0.0, "argmax_weight": 0.1}, "copy", True),
    ],
)
def test_when_the_final_exit_is_needed(tuning, init, needed):
    assert parse_early_exit({"layers": [3], "init": init, "tuning": tuning}, 24).needs_final_exit is needed


FAULTY = {
    "above the depth": ({"layers": [6, 30]}, "layers", "[6, 30]", "num_layers=24", "1..24"),
    "below one": ({"layers": [0, 6]}, "layers", "[0, 6]", "num_layers=24", "1..24"),
    "negative layer": ({"layers": [-1, 6]}, "layers", "[-1, 6]", "num_layers=24", "1..24"),
    "duplicated": ({"layers": [6, 6]}, "layers", "[6, 6]", "twice", "once"),
    "unordered": ({"layers": [12, 6]}, "layers", "[12, 6]", "ascend", "[6, 12]"),
    "empty": ({"layers": [], "tuning": {}, "inference": {}}, "layers", "[]", "at least one", "1..24"),
    "one number": ({"layers": 6}, "layers", "6", "a list of int", "layers=[6]"),
    "text": ({"layers": ["six"]}, "layers", "['six']", "a list of int", "layers=[1]"),
    "a fraction": ({"layers": [1.5]}, "layers", "[1.5]", "a list of int", "layers=[1]"),
    "a truth value": ({"layers": [True]}, "layers", "[True]", "a list of int", "layers=[1]"),
    "too few weights": (
        {"tuning__loss_weights": [1.0]},
        "tuning.loss_weights",
        "[1.0]",
        "1 weights for 2",
        "null",
    ),
    "too many weights": (
        {"tuning__loss_weights": [1, 1, 1]},
        "tuning.loss_weights",
        "1.0, 1.0",
        "3 weights",
        "null",
    ),
    "a negative weight": (
        {"tuning__loss_weights": [1, -1]},
        "tuning.loss_weights",
        "-1.0",
        "negative",
        "0 or more",
    ),
    "all weights zero": (
        {"tuning__loss_weights": [0, 0]},
        "tuning.loss_weights",
        "0.0",
        "no exit",
        "above 0",
    ),
    "not a weight": (
        {"tuning__loss_weights": [1, float("nan")]},
        "tuning.loss_weights",
        "nan",
        "float",
        "loss_weights=[0.5]",
    ),
    "negative ce": ({"tuning__ce_weight": -0.1}, "tuning.ce_weight", "-0.1", "negative", "0 or more"),
    "negative kl": ({"tuning__kl_weight": -1}, "tuning.kl_weight", "-1.0", "negative", "0 or more"),
    "negative argmax": (
        {"tuning__argmax_weight": -1},
        "tuning.argmax_weight",
        "-1.0",
        "negative",
        "0 or more",
    ),
    "token weighting": (
        {"tuning__token_weighting": "confidance"},
        "tuning.token_weighting",
        "confidance",
        "one of",
        "confidence?",
    ),
    "training schedule": ({"training__schedule": "liner"}, "training.schedule", "liner", "one of", "linear"),
    "schedule without steps": (
        {"training__schedule": "cosine"},
        "training.schedule_steps",
        "0",
        "positive",
        "number of steps",
    ),
    "curriculum": (
        {"training__curriculum": "rotate"},
        "training.curriculum",
        "rotate",
        "one of",
        "rotational",
    ),
    "curriculum without steps": (
        {"training__curriculum": "gradual"},
        "training.curriculum_steps",
        "0",
        "gradual",
        "number of steps",
    ),
    "negative factor": (
        {"training__initial_factor": -1},
        "training.initial_factor",
        "-1",
        "negative",
        "0 or",
    ),
    "no period": ({"training__curriculum_period": 0}, "training.curriculum_period", "0", "positive", "null"),
    "all layers dropped": (
        {"training__layer_dropout": {"max_rate": 1.0}},
        "training.layer_dropout.max_rate",
        "1.0",
        "[0, 1)",
        "0.1",
    ),
    "ratio": (
        {"training__bubble_filling": {"backward_ratio": 0}},
        "training.bubble_filling.backward_ratio",
        "0",
        "positive",
        "2.0",
    ),
    "chunk": ({"tuning__loss_chunk_tokens": 0}, "tuning.loss_chunk_tokens", "0", "positive", "256"),
    "unknown key": ({"layer": [1]}, "layer", "[1]", "unknown key", "did you mean layers?"),
    "unknown inner key": ({"head__nrom": True}, "head.nrom", "True", "unknown key", "did you mean norm?"),
    "unlike any key": ({"zzz": 1}, "zzz", "1", "unknown key", "known keys: layers"),
    "section is a list": ({"ridge": [1]}, "ridge", "[1]", "mapping", "tokens"),
    "entry is no section": ({"head": [{}, 1]}, "head[1]", "1", "mapping", "block"),
    "projection": ({"head__projection": "tie"}, "head.projection", "tie", "one of", "did you mean tied?"),
    "init": ({"init": "zeros"}, "init", "zeros", "one of", "ridge | copy | random"),
    "not a truth value": ({"head__norm": "yes"}, "head.norm", "yes", "bool", "head.norm=true"),
    "no such MLP": ({"head__mlp": "besides"}, "head.mlp", "besides", "one of", "did you mean beside?"),
    "beside what is not there": (
        {"head__mlp": "beside", "head__linear": False, "init": "copy"},
        "head.mlp",
        "beside",
        "lacks",
        "++model.early_exit.head.mlp=residual",
    ),
    "a step before a translator": (
        {"head__mlp": "residual"},
        "head.mlp",
        "residual",
        "beside",
        "++model.early_exit.head.mlp=beside",
    ),
    "threshold too high": ({"inference__threshold": 1.1}, "inference.threshold", "1.1", "[0, 1]", "0.8"),
    "threshold too low": ({"inference__threshold": -0.1}, "inference.threshold", "-0.1", "[0, 1]", "0.8"),
    "one of the thresholds": (
        {"inference__threshold": [0.5, 2]},
        "inference.threshold",
        "2.0",
        "[0, 1]",
        "0.8",
    ),
    "threshold not a number": (
        {"inference__threshold": "high"},
        "inference.threshold",
        "high",
        "float",
        "inference.threshold=0.5",
    ),
    "too few thresholds": (
        {"inference__threshold": [0.5]},
        "inference.threshold",
        "[0.5]",
        "1 thresholds for 2",
        "one per exit",
    ),
    "exits that are not there": (
        {"inference__exits": [6, 7], "inference__threshold": 0.5},
        "inference.exits",
        "[6, 7]",
        "[6, 12]",
        "null",
    ),
    "exits twice": (
        {"inference__exits": [6, 6], "inference__threshold": 0.5},
        "inference.exits",
        "[6, 6]",
        "once",
        "[6]",
    ),
    "ridge without translator": (
        {"init": "ridge", "head__linear": False},
        "init",
        "ridge",
        "lacks",
        "head.linear=true",
    ),
    "ridge tokens": ({"ridge__tokens": 0}, "ridge.tokens", "0", "positive", "40960"),
    "ridge penalty": ({"ridge__penalty": 0}, "ridge.penalty", "0.0", "positive", "0.01"),
    "shortlist of nothing": (
        {"head__shortlist_size": 0},
        "head.shortlist_size",
        "0",
        "1..1000",
        "use e.g. 1000,",
    ),
    "shortlist above the vocabulary": (
        {"head__projection": "shortlist", "head__shortlist_size": 1001},
        "head.shortlist_size",
        "1001",
        "1..1000",
        "use e.g. 1000, or set model.early_exit.head.projection=tied",
    ),
    "training a tied projection": (
        {"head__projection": "tied"},
        "head.train_projection",
        "True",
        "backbone",
        "untied",
    ),
}


@pytest.mark.parametrize("case", FAULTY)
def test_a_fault_names_key_value_rule_and_remedy(case):
    changes, key, value, rule, remedy = FAULTY[case]
    (fault,) = faults_of(changed(**changes))
    assert fault.key == f"model.early_exit.{key}"
    assert value in str(fault.value)
    assert rule in fault.rule
    assert remedy in fault.remedy


def test_layers_are_required():
    (fault,) = faults_of({"init": "copy"})
    assert fault.key == "model.early_exit.layers" and "required" in fault.rule


def test_no_objective():
    (fault,) = faults_of(changed(tuning__ce_weight=0, tuning__kl_weight=0, tuning__argmax_weight=0))
    assert fault.key == "model.early_exit.tuning.ce_weight" and "no objective" in fault.rule


def test_all_faults_are_listed_together():
    raw = changed(
        layers=[30], init="rigde", inference__threshold=7, tuning__loss_weights=[-1], head__projection="t"
    )
    keys = [fault.key.removeprefix("model.early_exit.") for fault in faults_of(raw)]
    assert keys == ["layers", "head.projection", "init", "tuning.loss_weights", "inference.threshold"]


def test_all_faults_of_form_are_listed_together():
    faults = faults_of(changed(lyers=[1], init=3, head__mpl=1))
    keys = [fault.key.removeprefix("model.early_exit.") for fault in faults]
    assert sorted(keys) == ["head.mpl", "init", "lyers"]


def test_null_sections_take_their_defaults():
    assert parse_early_exit({"layers": [1], "head": None}, 24).head == HeadConfig()


@pytest.mark.parametrize(("threshold", "exits"), [(0, 2), (1, 2), (0.5, 0), ([0.1, 0.9], 2)])
def test_thresholds_within_bounds(threshold, exits):
    assert check_thresholds(threshold, exits, "threshold") == []


@pytest.mark.parametrize(
    ("tokens", "features", "expected"),
    [(None, 576 + 1536, 40960), (None, 4096 + 14336, 184_320), (512, 18432, 512)],
)
def test_the_closed_form_reads_tokens_by_features(tokens, features, expected):
    from nemo_ee.config import RidgeConfig

    assert RidgeConfig(tokens).tokens_for(features) == expected
