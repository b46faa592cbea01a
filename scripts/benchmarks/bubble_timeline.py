# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What the schedule that fills pipeline bubbles costs and brings, on stages that sleep instead of computing.

    python scripts/benchmarks/bubble_timeline.py

Stages run nemo_ee's schedule with and without fills, in alternating steps. A forward pass is a sleep of `--unit`
milliseconds and a backward pass one of r times that, so the timetable is that of a machine with a core per stage,
whatever the machine has; messages between stages are real.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from harness import main, run_ranks
from report import cell, columns, ratio, table

OPTIONS = {
    "stages": (4, ""),
    "micro_batches": (8, ""),
    "ratio": (2.0, "r, of a backward pass to a forward pass"),
    "unit": (20.0, "milliseconds of a forward pass"),
    "steps": (15, "steps of either kind; one more warms up"),
}
NEMO, PLAIN, FILLED = False, "1F1B", "bubbles filled"
COLOURS = {"full": ("#a6c8e4", "#2f6c9f"), "warm-up fill": ("#f6c98b", "#d9822b")}
COLOURS |= {"cool-down fill": ("#b5d9b0", "#3f8f4f")}
"""Of forward and backward passes."""


def cases(arguments: Namespace) -> list[dict]:
    """One."""
    return [{"case": "pipeline"}]


def measure(case: Mapping, arguments: Namespace) -> dict:
    """Runs both plans; of each its steps' times, and the passes of the step whose time is the median."""
    from nemo_ee.training.bubble_plan import COOLDOWN, FULL, WARMUP, plan_step
    from tests.support.slept_stages import durations, run_alternately

    stages, unit, ratio = arguments.stages, arguments.unit / 1000, arguments.ratio
    of = (stages, arguments.micro_batches, ratio, (True,) * stages)
    plans = {PLAIN: plan_step(*of), FILLED: plan_step(*of, warmup=True, cooldown=True)}
    ranks = run_ranks(run_alternately, stages, plans, unit, ratio, arguments.steps)
    kinds, ways = dict(zip((FULL, WARMUP, COOLDOWN), COLOURS, strict=True)), {}
    for name, plan in plans.items():
        times = durations(ranks, name)
        middle = sorted(times)[len(times) // 2]
        step = [each for each in zip(*ranks, strict=True) if each[0].plan == name][times.index(middle)]
        begin, timeline = min(stage.events[0].start for stage in step), []
        for e in (event for stage in step for event in stage.events):
            at = e.stage, 1000 * (e.ready - begin), 1000 * (e.end - e.ready)
            timeline.append([*at, kinds[e.step.kind], e.step.backward, e.step.sample + 1])
        ways[name] = {"planned, ms": 1000 * plan.makespan * unit, "step, ms": [1000 * each for each in times]}
        ways[name]["busy"] = sum(event[2] for event in timeline) / (stages * 1000 * middle)
        ways[name] |= {"samples per step": plan.samples, "timeline": timeline}
        ways[name]["backward passes of stages"] = sum(p.backward for each in plan.passes for p in each)
    return {"ways": ways}


def page(rows: Sequence[dict]) -> tuple[dict, Any]:
    """What the template needs, and the timelines: a panel per schedule, a row per stage."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ways, stages = rows[0]["ways"], rows[0]["settings"]["stages"]
    names = ("planned, ms", "step, ms", "busy", "samples per step", "backward passes of stages")
    digits = {**dict.fromkeys(names, 0), "busy": 2}
    figure = Figure(figsize=(13.0, 0.62 * stages * len(ways) + 2.6), dpi=150, layout="constrained")
    for axes, (name, way) in zip(figure.subplots(len(ways), 1, sharex=True), ways.items(), strict=True):
        for stage, left, width, kind, backward, number in way["timeline"]:
            axes.barh(
                stage, width, 0.8, left, color=COLOURS[kind][backward], edgecolor="white", linewidth=0.8
            )
            look = {"ha": "center", "va": "center", "color": "white" if backward else "black", "fontsize": 9}
            axes.text(left + width / 2, stage, str(number), **look)
        axes.set_title(f"{name}: {way['samples per step']} samples", fontsize=13, loc="left")
        axes.set_yticks(range(stages), [f"stage {s}" for s in range(stages)])
        axes.set_ylim(stages - 0.4, -0.6)
    axes.set_xlabel("milliseconds since the step began", fontsize=12)
    pairs = [
        (kind, way, COLOURS[kind][k]) for kind in COLOURS for k, way in enumerate(("forward", "backward"))
    ]
    handles = [Patch(color=colour, label=f"{kind}, {way}") for kind, way, colour in pairs]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=11, frameon=False)
    longer = cell(ratio(ways, FILLED, PLAIN, "step, ms"), 3)
    return {"longer": longer, "table": table(rows, columns(digits), case=None, way="schedule")}, figure


if __name__ == "__main__":
    main("bubble_timeline")
