# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What the schedule that fills pipeline bubbles costs and brings, on stages that sleep instead of computing.

    python scripts/benchmarks/bubble_timeline.py

Four stages run nemo_ee's schedule with and without fills, in alternating steps. A forward pass is a sleep of
`--unit` milliseconds and a backward pass one of r times that, so the timetable is that of a machine with a
core per stage, whatever the machine has; messages between stages are real. Writes OUTPUT/bubble_timeline.md
and .png.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rank_processes import run_ranks
from slept_stages import Step, durations, run_alternately

from nemo_ee.core.bubbles import COOLDOWN, FULL, WARMUP, Plan, plan_step
from nemo_ee.evaluation import provenance
from nemo_ee.files.output import write_text, write_with
from nemo_ee.report.schema import Spread
from nemo_ee.report.statistics import spread
from nemo_ee.runtime.script import user_errors

PLAIN, FILLED = "1F1B", "bubbles filled"
COLOURS = {
    (FULL, False): "#a6c8e4",
    (FULL, True): "#2f6c9f",
    (WARMUP, False): "#f6c98b",
    (WARMUP, True): "#d9822b",
    (COOLDOWN, False): "#b5d9b0",
    (COOLDOWN, True): "#3f8f4f",
}
NAMES = {FULL: "micro-batch", WARMUP: "warm-up fill", COOLDOWN: "cool-down fill"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--ratio", type=float, default=2.0, help="r, of a backward pass to a forward pass")
    parser.add_argument("--unit", type=float, default=20.0, help="milliseconds of a forward pass")
    parser.add_argument("--steps", type=int, default=15, help="steps of either kind; one more warms up")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="directory")
    return parser.parse_args()


def median_step(ranks: Sequence[Sequence[Step]], plan: str) -> list[Step]:
    """Per stage, the step of that plan whose time is the median."""
    steps = [step for step in zip(*ranks, strict=True) if step[0].plan == plan]
    times = durations(ranks, plan)
    return list(steps[sorted(range(len(times)), key=times.__getitem__)[len(times) // 2]])


def busy_share(step: Sequence[Step], seconds: float) -> float:
    """Share of all stages' time in which they computed."""
    busy = sum(event.end - event.ready for stage in step for event in stage.events)
    return busy / (len(step) * seconds)


def page(
    arguments: argparse.Namespace, plans: dict[str, Plan], ranks: Sequence[Sequence[Step]], ratio: Spread
) -> str:
    """The results as Markdown."""
    unit, lines = arguments.unit / 1000, []
    for name, plan in plans.items():
        times = durations(ranks, name)
        found, step = spread([1000 * t for t in times]), median_step(ranks, name)
        passes = sum(p.backward for stage in plan.passes for p in stage)
        cells = [name, f"{1000 * plan.makespan * unit:.0f}"]
        cells.append(f"{found.median:.0f} ({found.q25:.0f} to {found.q75:.0f})")
        cells.append(f"{busy_share(step, found.median / 1000):.0%}")
        cells += [str(plan.samples), str(passes)]
        lines.append("| " + " | ".join(cells) + " |")
    filled, table = plans[FILLED], "\n".join(lines)
    stages = range(arguments.stages)
    return f"""# Filling pipeline bubbles: what it costs

`{provenance.command()}`

Commit {provenance.commit()}. {provenance.device()}, load average {provenance.load_average()} at the end.
{provenance.date()}. {arguments.stages} stages, {arguments.micro_batches} micro-batches per step, a forward
pass of {arguments.unit:g} ms and a backward pass of {arguments.ratio:g} times that, both slept.
Medians (quartiles) of {arguments.steps} steps of either kind, taken in turn. *Planned* is the plan's
makespan: sleeps end in time, messages take none. *Busy* is the share of all stages' time that is not idle, in
the median step.

| schedule | planned, ms | step, ms | busy | samples per step | backward passes of stages |
| --- | ---: | ---: | ---: | ---: | ---: |
{table}

A step with fills takes {ratio.median:.3f} ({ratio.q25:.3f} to {ratio.q75:.3f}) times as long as one without.
Warm-up fills per stage, from the first: {[filled.warmup_fills(s) for s in stages]}; cool-down fills whose
backward pass reaches it: {[filled.cooldown_fills(s) for s in stages]}.

![Timeline of both schedules](bubble_timeline.png)

Numbers are micro-batches; fills go on where full ones end. What is white is idle.
"""


def plot(
    arguments: argparse.Namespace, plans: dict[str, Plan], ranks: Sequence[Sequence[Step]], path: Path
) -> None:
    """A row per stage, a panel per schedule: each one's median step as it ran."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(13.0, 0.62 * arguments.stages * len(plans) + 2.6), dpi=150, layout="constrained")
    panels = figure.subplots(len(plans), 1, sharex=True)
    for axes, name in zip(panels, plans, strict=True):
        step = median_step(ranks, name)
        begin = min(stage.events[0].start for stage in step)
        for row, stage in enumerate(step):
            for event in stage.events:
                left, width = 1000 * (event.ready - begin), 1000 * (event.end - event.ready)
                colour = COLOURS[event.step.kind, event.step.backward]
                axes.barh(row, width, 0.8, left, color=colour, edgecolor="white", linewidth=0.8)
                ink = "white" if event.step.backward else "black"
                number = str(event.step.sample + 1)
                axes.text(left + width / 2, row, number, ha="center", va="center", color=ink, fontsize=9)
        end = 1000 * (max(stage.events[-1].end for stage in step) - begin)
        axes.axvline(end, color="#444444", linestyle=":", linewidth=1.5)
        title = f"{name}: {plans[name].samples} samples in {end:.0f} ms"
        title += f", stages busy {busy_share(step, end / 1000):.0%} of the time"
        axes.set_title(title, fontsize=13, loc="left")
        axes.set_yticks(range(arguments.stages), [f"stage {s}" for s in range(arguments.stages)], fontsize=11)
        axes.set_ylim(arguments.stages - 0.4, -0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=11)
    panels[-1].set_xlabel("milliseconds since the step began", fontsize=12)
    panels[-1].set_xlim(left=0)
    handles = [
        Patch(color=colour, label=f"{NAMES[kind]}, {'backward' if backward else 'forward'}")
        for (kind, backward), colour in COLOURS.items()
    ]
    handles.append(Patch(facecolor="white", edgecolor="#999999", label="idle"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=11, frameon=False)
    write_with(path, partial(figure.savefig, format="png"))


def main() -> None:
    arguments = parse_arguments()
    with user_errors(nemo=False):
        exits = (True,) * arguments.stages
        of = (arguments.stages, arguments.micro_batches, arguments.ratio, exits)
        plans = {PLAIN: plan_step(*of), FILLED: plan_step(*of, warmup=True, cooldown=True)}
        unit = arguments.unit / 1000
        ranks = run_ranks(run_alternately, arguments.stages, plans, unit, arguments.ratio, arguments.steps)
        pairs = zip(durations(ranks, FILLED), durations(ranks, PLAIN), strict=True)
        ratio = spread([filled / plain for filled, plain in pairs])
        plot(arguments, plans, ranks, arguments.output / "bubble_timeline.png")
        result = page(arguments, plans, ranks, ratio)
        write_text(arguments.output / "bubble_timeline.md", result)
        print(result)


if __name__ == "__main__":
    main()
