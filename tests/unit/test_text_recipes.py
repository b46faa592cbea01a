# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The comparison of texts to tune on: what a recipe gets, and its page with invented numbers."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "scripts" / "benchmarks"


@pytest.fixture
def text_recipes(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import text_recipes

    yield text_recipes
    sys.modules.pop("text_recipes")


def interval(value):
    return {"value": value, "low": 0.1, "high": 0.9}


def row(name, written=None, agreeing=300):
    thresholds = {
        f"{threshold:g}": {
            "agreement": interval(1 - (1 - threshold) ** 2),
            "leave early, %": 100 * (0.9 - threshold),
            "layers left out, %": 100 * (0.5 - threshold / 2),
        }
        for threshold in (0.5, 0.8)
    }
    way = {
        "answers, exit 10": 0.625,
        "answers, exit 20": 0.75,
        "articles, exit 10": 0.375,
        "articles, exit 20": 0.5,
    }
    cost = {"closed form, s": 20.0, "tuning, s": 100.0, "steps": 10, "s/step": 1.5}
    return {
        "case": {"recipe": name},
        "settings": {"minutes": 3.0},
        "ways": {"": {key: interval(value) for key, value in way.items()}},
        "thresholds": thresholds,
        "per prompt": {"tokens": [600, 600], "agreeing": {"10": [agreeing, 300], "20": [300, 300]}},
        "about case": {"held_out": 40},
        "cost": {"": {**cost, "tokens that count, each time they are read": 3600.0, **(written or {})}},
    }


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_page_of_texts(text_recipes):
    written = {"writing answers, s": 90.0, "tokens written": 15000, "answers": 128}
    values, figure = text_recipes.page([row("Wikipedia"), row("answers", written, 420)])
    around = "[0.100, 0.900]"
    assert ["answers", *(f"{n:.3f} {around}" for n in (0.625, 0.75, 0.375, 0.5))] in cells(
        values["agreements"]
    )
    assert ["Wikipedia", "0.8", f"0.960 {around}", "10.0", "10.0"] in cells(values["thresholds"])
    costs = cells(values["costs"])
    assert ["answers", "90", "15,000", "128", "20", "100", "10", "1.50", "3,600"] in costs
    assert ["Wikipedia", "", "", "", "20", "100", "10", "1.50", "3,600"] in costs
    gained = cells(values["gained"])
    assert ["answers", "10", "0.100 [0.000, 0.200]"] in gained, "one prompt gained 0.2, the other nothing"
    assert ["answers", "20", "0.000 [0.000, 0.000]"] in gained and len(gained) == 4
    # Between 0.75 at a threshold of 0.5 (40 % early, 25 % of layers) and 0.96 at 0.8 (10 % and 10 %).
    assert ["answers", "18.6", "14.3", "11.4", "10.7"] in cells(values["equal"])
    assert values["processor_seconds"] == 360 and values["first"] == "Wikipedia" and figure is not None


def test_what_is_left_for_tuning_is_the_same_time_less_what_was_written(text_recipes, monkeypatch):
    calls, known = [], {}

    def part(name, work, arguments, *others):
        if name not in known:
            calls.append((name, *others))
            before = 80.0 if name.endswith("_0") else 60.0
            known[name] = {"seconds": 100.0, "before": before, "per_step": 2.0, "all": 1.0, "samples": 1}
            known[name] |= {"tokens_per_sample": 1.0, "tokens": 1, "answers": 1}
        return known[name]

    monkeypatch.setattr(text_recipes, "part", part)
    arguments = Namespace(minutes=3.0, prompts=[5], only="", work="work")
    for case in text_recipes.cases(arguments):
        text_recipes.measure(case, arguments)
    timed = (11, 1, "model.optim.lr=0")
    assert calls == [
        ("started_0", 0, *timed),
        ("tuned_0", 0, 140, 15, "model.adapter_path=work/started_0.nemo"),
        ("measured_0",),
        ("written_5", 5),
        ("started_5", 5, *timed),
        ("tuned_5", 5, 100, 11, "model.adapter_path=work/started_5.nemo"),
        ("measured_5",),
        ("tuned_5_mixed", 5, 90, 10, "model.adapter_path=work/started_0.nemo"),
        ("measured_5_mixed",),
    ]
