# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of decoding over slept stages, in its smallest form, in the tests' own processes."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"))  # of ranks as well

import pipeline_decoding  # noqa: E402


def test_no_token_comes_before_its_exits_stage_can_have_it(workers, monkeypatch, tmp_path):
    def run_ranks(function, world_size, *arguments):
        return workers(world_size).run(function, *arguments, timeout=300)

    monkeypatch.setattr(pipeline_decoding, "run_ranks", run_ranks)
    monkeypatch.setattr(sys, "argv", ["pipeline_decoding.py", "--quick", "--output", str(tmp_path)])
    pipeline_decoding.main()
    rows = json.loads((tmp_path / "pipeline_decoding.json").read_text())
    assert [(row["stages"], row["batch"]) for row in rows] == [(2, 1), (2, 4)]
    for row in rows:
        unit, (full, first, mixture) = row["unit"], row["ways"]
        for way, left_on in ((full, {2}), (first, {1}), (mixture, {1, 2})):
            assert all(len(each) == row["tokens"] and each[0] == 2 for each in way["passed"])
            assert {stages for each in way["passed"] for stages in each[1:]} <= left_on
            assert min(way["first"]) >= 2 * unit
            assert min(way["between"]) >= way["alone"] and way["timetable"] > 0.999 * way["alone"]
        assert (full["alone"], first["alone"]) == (2 * unit, unit)
    page = (tmp_path / "pipeline_decoding.md").read_text()
    assert all(way["name"] in page for way in rows[0]["ways"])
    assert (tmp_path / "pipeline_decoding.png").stat().st_size > 10_000
