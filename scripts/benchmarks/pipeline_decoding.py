# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What exits save where pipeline stages decode: time between tokens against stages that a token passes.

    python scripts/benchmarks/pipeline_decoding.py
    python scripts/benchmarks/pipeline_decoding.py --quick --output smoke   # a smoke test

Two and four stages decode with nemo_ee's session, as processes of this machine. A pass of a stage is a sleep
of `--unit` milliseconds and what a tiny model computes, so that a few cores have room for all stages; messages
between them are real. It therefore measures the schedule, not a model: nothing here says how fast a cluster
is. Full depth, exits that every token takes on one stage, and a mixture take turns. Writes
OUTPUT/pipeline_decoding.json, .md and .png.
"""

import argparse
import itertools
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from pipeline_decoding_report import page, plot
from pipeline_decoding_stage import Call, Job, Way, measure
from pipeline_timetable import token_times
from rank_processes import run_ranks

from nemo_ee.evaluation import provenance
from nemo_ee.files.output import write_text, write_with
from nemo_ee.runtime.script import user_errors

FULL = "full depth"
MIXTURE = {2: 0.42, 4: 0.45}
"""Stages -> threshold by which about half of the tokens leave on the first stage, and some on each."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--unit", type=float, default=50.0, help="milliseconds that a pass sleeps")
    parser.add_argument("--tokens", type=int, default=16, help="generated per sequence")
    parser.add_argument("--repeats", type=int, default=5, help="calls of every way at every batch")
    parser.add_argument("--quick", action="store_true", help="a smoke test: two stages, few tokens, once")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="directory")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.unit, arguments.tokens, arguments.repeats = 5.0, 4, 1
    if arguments.tokens < 2 or arguments.repeats < 1:
        parser.error("--tokens must be 2 or more, --repeats 1 or more")
    return arguments


def ways(stages: int) -> tuple[Way, ...]:
    """Full depth first; then exits that every token takes, and the mixture."""
    always = [Way(f"exit on stage {stage}", {stage: 0.0}) for stage in range(1, stages)]
    mixture = Way("mixture", dict.fromkeys(range(1, stages), MIXTURE[stages]))
    return (Way(FULL, {}), *always, mixture)


def measure_pipeline(stages: int, arguments: argparse.Namespace) -> list[dict]:
    """Runs one pipeline; returns its rows of the results, one per batch."""
    unit = arguments.unit / 1000
    job = Job(stages, (1, 4), ways(stages), unit, arguments.tokens, arguments.repeats)
    ranks = run_ranks(measure, stages, job)
    return [
        {
            "stages": stages,
            "batch": batch,
            "unit": arguments.unit,
            "tokens": arguments.tokens,
            "message": 1000 * message([rank[batch, FULL] for rank in ranks]),
            "ways": [
                asdict(way) | summary([rank[batch, way.name] for rank in ranks], arguments.unit)
                for way in job.ways
            ],
            "command": provenance.command(),
            "commit": provenance.commit(),
            "device": provenance.device(),
            "load": provenance.load_average(),
            "date": provenance.date(),
            "torch": torch.__version__,
        }
        for batch in job.batches
    ]


def summary(ranks: list[list[Call]], unit: float) -> dict:
    """One way at one batch, in milliseconds.

    Args:
        ranks: stage -> calls.
        unit: milliseconds of a pass.

    Returns:
        first: of every call, until the first token; mean over sequences. between: likewise, from a token of a
        sequence to its next one; mean over tokens, too. slept, computed: of every stage, in a pass behind the
        prompts' one; mean over calls. passed: [B][T] stages that tokens passed, the same in every call. alone,
        timetable: `between` as predicted without and with sequences that wait for each other.
    """
    calls, passed = ranks[0], ranks[0][0].passed
    assert all(call.passed == passed for call in calls), "the same prompts take the same exits in every call"
    passes = [[each for call in rank for each in call.passes[1:]] for rank in ranks]
    return {
        "first": [1000 * fmean(times[0] for times in call.times) for call in calls],
        "between": [1000 * mean_gap(call.times) for call in calls],
        "slept": [1000 * fmean(awake - begin for begin, awake, _ in each) for each in passes],
        "computed": [1000 * fmean(end - awake for _, awake, end in each) for each in passes],
        "passed": passed,
        "alone": unit * fmean(stages for each in passed for stages in each[1:]),
        "timetable": unit * mean_gap(token_times(passed)),
    }


def mean_gap(times: list[list[float]]) -> float:
    """From a token to the next one of its sequence; every sequence has as many."""
    return fmean((each[-1] - each[0]) / (len(each) - 1) for each in times)


def message(ranks: list[list[Call]]) -> float:
    """Mean seconds from a pass to the next one that needs it, at full depth, where no stage is ever busy then.

    Args:
        ranks: stage -> calls.
    """
    waited = []
    for stages in zip(*ranks, strict=True):
        *_, last = passes = [call.passes for call in stages]
        for one, following in [*itertools.pairwise(passes), (last[:-1], passes[0][1:])]:
            waited += [after[0] - before[2] for before, after in zip(one, following, strict=True)]
    return fmean(waited)


def main() -> None:
    arguments = parse_arguments()
    with user_errors(nemo=False):
        stages = (2,) if arguments.quick else (4, 2)
        rows = [row for p in stages for row in measure_pipeline(p, arguments)]
        result, path = page(rows), arguments.output / "pipeline_decoding"
        write_text(path.with_suffix(".json"), json.dumps(rows, indent=1) + "\n")
        write_with(path.with_suffix(".png"), partial(plot(rows).savefig, format="png"))
        write_text(path.with_suffix(".md"), result)
        print(result)


if __name__ == "__main__":
    main()
