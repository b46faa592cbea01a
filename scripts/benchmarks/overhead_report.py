# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The page and the plot of training_overhead.py."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from overhead_stage import CHUNK_TOKENS

from nemo_ee.files.output import write_text, write_with
from nemo_ee.report.schema import Spread
from nemo_ee.report.statistics import spread
from nemo_ee.report.style import label, new_figure

MIB = 2**20
MEASURED, PREDICTED, PATH = "#0072b2", "#d55e00", "#6e6e6e"
GRADIENTS = "#c4c4c4"


def write_page(rows: Sequence[dict], directory: Path) -> str:
    """Writes training_overhead.md and .png; returns the page.

    Args:
        rows: of training_overhead.json, in the order of the page.
        directory: where to.
    """
    page = _page(rows)
    write_with(directory / "training_overhead.png", partial(_plot(rows).savefig, format="png"))
    write_text(directory / "training_overhead.md", page)
    return page


def ratios(row: dict, what: str) -> Spread:
    """Time with exits over time without, step by step."""
    times = row[what]
    return spread([e / p for e, p in zip(times["exits"], times["plain"], strict=True)])


def logits(row: dict) -> float:
    """MiB of one exit's logits of one micro-batch, in float32; longer ones are taken chunk by chunk."""
    size = row["size"]
    return 4 * min(size["micro_batch"] * size["sequence"], CHUNK_TOKENS) * size["vocabulary"] / MIB


def limit(row: dict) -> float:
    """MiB that an exit holds besides gradients that stay: logits, probabilities and their gradient, and its
    projection's gradient from one micro-batch, not added up yet."""
    size = row["size"]
    return 3 * logits(row) + (2 if row["bf16"] else 4) * size["hidden"] * size["vocabulary"] / MIB


def beyond(stage: dict) -> float:
    """MiB by which exits raise a stage's peak, their weights' gradients apart."""
    return (stage["exits"] - stage["plain"] - _gradients(stage)) / MIB


def _gradients(stage: dict) -> int:
    return stage["exit_gradients"]


def _page(rows: Sequence[dict]) -> str:
    first = rows[0]
    size = first["size"]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    commands = "\n\n".join(dict.fromkeys(f"`{row['command']}`" for row in rows))
    devices = "; ".join(dict.fromkeys(row["device"] for row in rows))
    counts = sorted({len(row["step"]["plain"]) for row in rows})
    steps = " or ".join(map(str, counts))
    loads = sorted(float(row["load"]) for row in rows)
    precision = "bf16" if first["bf16"] else "float32"
    time = _table(
        [
            *("case", "processes x threads", "without, ms", "with exits, ms", "measured ratio"),
            *("predicted", "FLOPs", "critical path", "with optimizer"),
        ],
        [_time(row) for row in rows],
    )
    memory = _table(
        [
            *("case", "stage", "exits", "without, MiB", "with, MiB", "gradients of exits' weights, MiB"),
            *("beyond, MiB", "at most, MiB", "beyond / one exit's logits"),
        ],
        [cells for row in rows for cells in _memory(row)],
    )
    names = sorted({name for row in rows for name in row["losses"]})
    losses = _table(["case", *names], [[row["name"], *(_loss(row, name) for name in names)] for row in rows])
    layers = " and ".join(map(str, size["exits"]))
    return f"""# What training exits along costs

{commands}

Commit {commits}. {devices}; load averages from {loads[0]:.1f} to {loads[-1]:.1f} at the end of cases.
{rows[-1]["date"]}. {precision}, {size["layers"]} layers, hidden size {size["hidden"]}, vocabulary
{size["vocabulary"]:,}, sequences of {size["sequence"]} tokens, {size["micro_batches"]} micro-batches of
{size["micro_batch"]} per step. Exits behind layers {layers}; on a stage's last layer they belong to the next
stage (`pre_exit`). *Without*: the same model, weights and batches through the same schedule, its exits left
alone. Steps with and without alternate.

## Time

Forward and backward passes of a step, medians (quartiles) of {steps} steps of either kind; ratios are taken
pair by pair. *Predicted* counts FLOPs of matrix products and attention, and runs 1F1B's timetable with them
on the cores or GPUs that there are: the critical path where each stage has its own, and close to the ratio of
all *FLOPs* where stages share. *Critical path* is what it would be with one for each stage. *With optimizer*
is the measured ratio of whole steps; AdamW has the exits' weights to update as well, which no prediction here
counts.

{time}

![Measured and predicted ratios; memory](training_overhead.png)

## Memory

The most that torch's allocator had given out at any time of a step's forward and backward passes, beyond what
it had before them: activations, gradients and temporaries, but neither weights nor the optimizer's state; on
a CPU from the allocator's events in torch's profiler, in a step of its own. Weights of exits have gradients
like all others; what exits cost *beyond* these is set against one exit's logits of one micro-batch,
{logits(first):.1f} MiB in float32. While it is back-propagated an exit holds at most three tensors of that size
(its logits become probabilities and then their gradient; some operations make a copy) and its projection's new
gradient until that is added up: *at most*
{limit(first):.1f} MiB per stage, however many exits and micro-batches there are, if the peak is then at all.
Below 0: the peak is at a time when not all gradients of exits' weights exist.

{memory}

## Losses

Of the first weights on the first batch, nats per token: exits change nothing in the final exit.

{losses}
"""


def _time(row: dict) -> list[str]:
    prediction = row["prediction"]
    return [
        row["name"],
        f"{row['stages']} x {row['threads']}",
        *(_cell(spread([1000 * t for t in row["schedule"][kind]]), 0) for kind in ("plain", "exits")),
        _cell(ratios(row, "schedule"), 3),
        f"**{prediction['here']:.3f}**",
        f"{prediction['flops']:.3f}",
        f"{prediction['worker_per_stage']:.3f}",
        _cell(ratios(row, "step"), 3),
    ]


def _memory(row: dict) -> list[list[str]]:
    return [
        [
            row["name"],
            str(index),
            ", ".join(map(str, stage["exits_here"])) or "none",
            f"{stage['plain'] / MIB:.1f}",
            f"{stage['exits'] / MIB:.1f}",
            f"{_gradients(stage) / MIB:.1f}",
            f"{beyond(stage):+.1f}",
            f"{limit(row) if stage['exits_here'] else 0.0:.1f}",
            f"{beyond(stage) / logits(row):+.2f}",
        ]
        for index, stage in enumerate(row["memory"])
    ]


def _loss(row: dict, name: str) -> str:
    return f"{row['losses'][name]:.4f}" if name in row["losses"] else ""


def _cell(s: Spread, digits: int) -> str:
    return f"{s.median:.{digits}f} ({s.q25:.{digits}f} to {s.q75:.{digits}f})"


def _table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])


def _plot(rows: Sequence[dict]):
    bars = [
        (f"{row['name']}, stage {i}", row, stage) for row in rows for i, stage in enumerate(row["memory"])
    ]
    figure, (left, right) = new_figure(2, width=6.6, height=1.9 + 0.3 * max(len(bars), 2 * len(rows)))
    names = [row["name"] for row in rows]
    for position, row in enumerate(rows):
        found, prediction = ratios(row, "schedule"), row["prediction"]
        around = [[found.median - found.q25], [found.q75 - found.median]]
        first = position == 0
        left.plot(
            prediction["worker_per_stage"],
            position + 0.18,
            "|",
            color=PATH,
            markersize=20,
            markeredgewidth=2,
            label="critical path, a core per stage" if first else None,
        )
        left.plot(
            prediction["here"],
            position + 0.18,
            "D",
            color=PREDICTED,
            markersize=7,
            label="predicted for this machine" if first else None,
        )
        left.errorbar(
            found.median,
            position - 0.18,
            xerr=around,
            fmt="o",
            color=MEASURED,
            capsize=4,
            label="measured (bars: quartiles)" if first else None,
        )
    left.axvline(1.0, color="#444444", linewidth=1.0)
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) - 0.5, -0.5)
    label(left, "Time of a step's passes", "with exits / without", "")
    for position, (_, row, stage) in enumerate(bars):
        gradients, first = _gradients(stage) / MIB, position == 0
        name = "gradients of exits' weights" if first else None
        right.barh(position, gradients, 0.6, color=GRADIENTS, label=name)
        most = gradients + (limit(row) if stage["exits_here"] else 0.0)
        name = "limit: these, 3 x one exit's logits, its projection's gradient" if first else None
        right.plot(most, position, "|", color=PREDICTED, markersize=13, markeredgewidth=2, label=name)
        name = "measured" if first else None
        right.plot(gradients + beyond(stage), position, "o", color=MEASURED, markersize=6, label=name)
    right.axvline(0.0, color="#444444", linewidth=1.0)
    right.set_yticks(range(len(bars)), [name for name, *_ in bars], fontsize=9)
    right.set_ylim(len(bars) - 0.5, -0.5)
    label(right, "Memory that exits add to a stage's peak", "MiB", "")
    for axes in (left, right):
        axes.grid(False, axis="y")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=10, frameon=False)
    return figure
