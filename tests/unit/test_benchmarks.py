# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The harness of the benchmarks, and that their pages are what their one command makes of what was measured."""

import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS, PAGES = ROOT / "scripts" / "benchmarks", ROOT / "docs" / "benchmarks"
MEASURED = sorted(PAGES.rglob("*.jsonl"))
MOST_LINES = 1700


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path[:] = before


def test_the_folder_stays_small():
    assert sum(len(path.read_text().splitlines()) for path in BENCHMARKS.glob("*.py")) <= MOST_LINES


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: str(path.relative_to(PAGES)))
def test_a_page_is_made_of_its_measurements(path, tmp_path):
    from report import write_page

    (tmp_path / path.name).write_text(path.read_text())
    page = write_page(path.stem, tmp_path)
    assert page == path.with_suffix(".md").read_text() == (tmp_path / f"{path.stem}.md").read_text()
    assert (tmp_path / f"{path.stem}.png").exists() == path.with_suffix(".png").exists()


def test_every_template_has_a_page():
    templates = {path.stem for path in (PAGES / "templates").glob("*.md")}
    assert templates >= {path.stem for path in MEASURED}
    for name in templates:
        assert (BENCHMARKS / f"{name}.py").exists() and (PAGES / f"{name}.md").exists()


def test_a_benchmark_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    import harness
    import report

    subject, measured = ModuleType("subject", "A subject.\n"), []
    subject.OPTIONS = {"sizes": ([1, 2], "sizes"), "speed": (1.5, "a setting"), "model": (None, "a file")}
    subject.AXES, subject.NEMO = ("sizes",), False
    subject.cases = lambda arguments: [{"size": size} for size in arguments.sizes]

    def measure(case, arguments):
        if case["size"] == 3:
            raise KeyboardInterrupt
        measured.append(case["size"])
        return {"ways": {"": {"rate": [case["size"] * arguments.speed]}}}

    subject.measure = measure
    monkeypatch.setitem(sys.modules, "subject", subject)
    monkeypatch.setattr(report, "write_page", lambda name, folder: f"the page of {name}")

    def run(*options):
        monkeypatch.setattr(
            sys, "argv", ["subject.py", "--output", str(tmp_path), "--model", "/a/b.nemo", *options]
        )
        harness.main("subject")
        return capsys.readouterr().out

    with pytest.raises(KeyboardInterrupt):
        run("--sizes", "1,3,2")
    rows = harness.load(tmp_path / "subject.jsonl")
    assert measured == [1, 2] and [row["case"] for row in rows] == [{"size": 1}, {"size": 2}], (
        "sorted: 3 comes last"
    )
    assert rows[0]["settings"] == {"speed": 1.5, "model": "b.nemo"} and rows[0]["ways"] == {
        "": {"rate": [1.5]}
    }
    assert {"command", "commit", "device", "load", "date"} <= set(rows[0]["about"])
    assert "/a/" not in rows[0]["about"]["command"]
    printed = run("--sizes", "1,2,4")
    assert measured == [1, 2, 4] and "1: done already" in printed and "the page of subject" in printed
    run("--again", "--sizes", "2")
    assert measured == [1, 2, 4, 2] and len(harness.load(tmp_path / "subject.jsonl")) == 3
    with pytest.raises(SystemExit, match="has results of other settings"):
        run("--speed", "2")


def test_ways_take_turns_and_what_cannot_run_is_left_out(monkeypatch):
    import harness

    calls, now = [], [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def way(name, seconds):
        def run(repeat):
            calls.append((repeat, name))
            now[0] += seconds
            return {"seconds": seconds} if repeat >= 0 else {}

        return run

    def impossible(repeat):
        raise NotImplementedError("no such weights")

    seen = []
    ways = {"base": way("base", 1.0), "slow": way("slow", 6.0), "quick": way("quick", 1.0)}
    ways |= {"impossible": impossible, "endless": way("endless", 31.0)}
    found, left_out = harness.alternate(ways, 5, lambda repeat, names: seen.append((repeat, sorted(names))))
    assert left_out == {"impossible": "no such weights", "endless": "its first call took 31 s"}
    assert found["base"]["seconds"] == [1.0] * 5 and found["quick"]["seconds"] == [1.0] * 5
    assert found["slow"]["seconds"] == [6.0] * 4, "20 s of 6 s each"
    assert seen == [(n, ["base", "quick", "slow"]) for n in range(4)] + [(4, ["base", "quick"])]
    orders = {tuple(name for repeat, name in calls if repeat == n) for n in range(4)}
    assert len(orders) > 1, "another order in another repetition"


def test_ratios_are_taken_within_repetitions():
    from report import Column, ratio

    base = [1.0, 10.0, 100.0, 1000.0]
    ways = {"a": {"rate": [2.0, None, 200.0, 2000.0]}, "b": {"rate": base}, "c": {"rate": [1.0, 15.0, 300.0]}}
    assert ratio(ways, "a", "b", "rate") == {"value": 2.0, "low": 2.0, "high": 2.0}
    found = ratio(ways, "c", "b", "rate")
    assert found["value"] == 1.5 and found["low"] == 1.0 and math.isclose(found["high"], 3.0)
    assert ratio(ways, "a", "none", "rate") is None
    assert Column("x", "rate", 1, "b").cell(ways, "a") == "2.0 [2.0, 2.0]"
    assert Column("x", "rate", 0).cell(ways, "a") == "200 (101 to 1,100)"
    assert Column("x", "other").cell(ways, "a") == ""


def test_an_interval_covers_the_median_as_often_as_it_says():
    import numpy as np
    from report import interval

    generator, held = np.random.default_rng(1), 0
    for _ in range(200):
        found = interval(generator.lognormal(0.0, 0.3, 20))
        held += found["low"] <= 1.0 <= found["high"]
    assert 0.9 <= held / 200 <= 0.99
