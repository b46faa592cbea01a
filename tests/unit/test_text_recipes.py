# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The comparison of texts to tune on: what a recipe gets, what is asked, and the page with invented numbers."""

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "scripts" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Names of a benchmark's module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield lambda name: runpy.run_path(str(BENCHMARKS / f"{name}.py"))
    for name in ("exit_recipes", "text_report"):
        sys.modules.pop(name, None)


def quality(layer, agreement):
    return {"layer": layer, "agreement": agreement, "agreement_ci": {"low": 0.1, "high": 0.9}, "tokens": 1200}


def row(name, written=None, agreeing=300):
    thresholds = [
        {
            "threshold": threshold,
            "agreement": 1 - (1 - threshold) ** 2,
            "agreement_ci": {"low": 0.2, "high": 1.0},
            "early": 0.9 - threshold,
            "layers_left_out": 0.5 - threshold / 2,
            "tokens": 1000,
        }
        for threshold in (0.5, 0.8)
    ]
    run = {"all": 100.0, "before": 20.0, "per_step": 1.5, "samples": 30, "tokens_per_sample": 120.0}
    return {
        "name": name,
        "command": "python text_recipes.py",
        "commit": "0123abc",
        "device": "CPU",
        "minutes": 3.0,
        **({"written": written} if written else {}),
        "started": run,
        "tuned": {"steps": 10, **run, "load": "3.0"},
        "measured": {
            "answers": [quality(10, 0.625), quality(20, 0.75)],
            "articles": [quality(10, 0.375), quality(20, 0.5)],
            "per_prompt": {"tokens": [600, 600], "agreeing": {"10": [agreeing, 300], "20": [300, 300]}},
            "thresholds": thresholds,
            "prompts": 40,
            "ended": 30,
            "date": "2026-01-02T03:04:05Z",
            "load": "17.0",
        },
    }


def test_page_of_texts(benchmark, tmp_path):
    written = {"seconds": 90.0, "tokens": 15000, "answers": 128}
    page = benchmark("text_report")["write_page"]([row("Wikipedia"), row("answers", written, 420)], tmp_path)
    assert (tmp_path / "text_recipes.md").read_text() == page and (
        tmp_path / "text_recipes.png"
    ).stat().st_size
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line[:1] == "|"
    ]
    interval = "[0.100, 0.900]"
    assert ["answers", *(f"{n:.3f} {interval}" for n in (0.625, 0.75, 0.375, 0.5))] in cells
    assert ["Wikipedia", "0.8", "0.960 [0.200, 1.000]", "10.0 %", "10.0 %"] in cells
    assert ["answers", "90", "15,000", "128", "20", "100", "10", "1.50", "3,600"] in cells
    assert ["Wikipedia", "", "", "", "20", "100", "10", "1.50", "3,600"] in cells
    assert ["answers", "10", "+0.100 [+0.000, +0.200]"] in cells, "one prompt gained 0.2, the other nothing"
    assert ["answers", "20", "+0.000 [+0.000, +0.000]"] in cells
    # Between 0.75 at a threshold of 0.5 (40 % early, 25 % of layers) and 0.96 at 0.8 (10 % and 10 %).
    assert ["answers", "18.6 %", "14.3 %", "11.4 %", "10.7 %"] in cells
    assert "(360 s)" in page and "3 to 17 meanwhile" in page and "40 prompts" in page


def test_what_is_left_for_tuning_is_the_same_time_less_what_was_written(benchmark, tmp_path, monkeypatch):
    names = benchmark("text_recipes")
    calls = []

    def part(row, name, path, work, *arguments):
        if name not in row:
            calls.append((name, arguments[1].name, *arguments[2:]))
            before = 80.0 if arguments[1].begins_on_articles else 60.0
            row = {**row, name: {"seconds": 100.0, "before": before, "per_step": 2.0}}
        rows[row["name"]] = row
        return row

    globals_ = names["main"].__globals__
    monkeypatch.setitem(globals_, "_part", part)
    rows = {}
    monkeypatch.setitem(globals_, "load", lambda path: list(rows.values()))
    places = ["--model", "m", "--train", "t", "--validation", "v", "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["text_recipes.py", *places, "--minutes", "3", "--prompts", "5", "7"])
    monkeypatch.setitem(sys.modules, "text_report", type(sys)("text_report"))
    sys.modules["text_report"].write_page = lambda rows, output: ""
    names["main"]()
    one, other = "its own answers to 5 prompts", "its own answers to 7 prompts"
    assert calls == [
        ("started", "Wikipedia"),
        ("tuned", "Wikipedia", 140),
        ("measured", "Wikipedia"),
        *(
            call
            for name in (one, other)
            for call in (
                ("written", name),
                ("started", name),
                ("tuned", name, 100),
                ("measured", name),
                ("tuned", f"closed form on Wikipedia, then {name}", 90),
                ("measured", f"closed form on Wikipedia, then {name}"),
            )
        ),
    ]
