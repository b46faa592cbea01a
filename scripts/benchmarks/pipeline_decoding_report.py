# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The page and the plot of pipeline_decoding.py."""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from pipeline_decoding_stage import HIDDEN

from nemo_ee.report.schema import Spread
from nemo_ee.report.statistics import spread
from nemo_ee.report.style import label, new_figure

MEASURED, TIMETABLE, ALONE = "#0072b2", "#e69f00", "#444444"


def page(rows: Sequence[dict]) -> str:
    """The results as Markdown.

    Args:
        rows: of pipeline_decoding.json.
    """
    first = rows[0]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    loads = sorted(float(row["load"]) for row in rows)
    sections = "\n\n".join(
        f"## {stages} stages\n\n{_times([row for row in rows if row['stages'] == stages])}"
        for stages in dict.fromkeys(row["stages"] for row in rows)
    )
    return f"""# Decoding over pipeline stages: what exits save

`{first["command"]}`

Commit {commits}. {first["device"]}, torch {first["torch"]}; load averages from {loads[0]:.1f} to {loads[-1]:.1f}
at the end of pipelines. {rows[-1]["date"]}.

**Stages sleep.** Each is a process of this machine, which need not have a core for every stage: a pass, however many
tokens it has, is a sleep of {first["unit"]:g} ms and what a tiny random model (hidden size {HIDDEN}) computes.
Sessions, messages between processes and waiting are nemo_ee's own. So this page shows the schedule and what it adds to
passes; it says nothing about a model's passes, or about a network.

{first["tokens"]} tokens per sequence, drawn; all ways take turns on the same weights and prompts,
{len(first["ways"][0]["between"])} times. Medians (quartiles) over these calls; ratios are taken within a turn.
*Between tokens* is the mean, over tokens and sequences, from a token of a sequence to its next. A prompt's token never
leaves early, so *first token* should take a pass on every stage in every way. Every stage but the last ends with an
exit; its threshold is 0 where all tokens leave there, and in the mixture such that about half leave on the first
stage. *Left on* counts tokens behind the first. Predictions of the time between tokens, from the exits that tokens
really took:

- *stages x pass*: stages that a token passes, on average, times the sleep. Right for a sequence that never waits for
  another.
- *timetable*: the session's rules, simulated. The first stage feeds what it has, after a look whether answers are
  due that it would else miss by a message's time; an answer that comes while others are fed waits for the end of that
  pass. Passes take their sleep alone; messages take no time.
- *with real passes*: the timetable with what passes of that way took, sleep and computing, and full depth's message
  after each: how much of a difference is the tiny model's and the machine's (last table).

{sections}

![Measured and predicted times between tokens](pipeline_decoding.png)

## What passes and messages took

Means in ms over all stages. *Sleep ends late*: beyond {first["unit"]:g} ms. *Message*: at full depth, from the end of
a pass to the begin of the next one that needs it: packing, sending, receiving, waking up. Processes compute in
the same moments only if tokens leave early, and then share cores.

{_passes(rows)}
"""


def plot(rows: Sequence[dict]) -> Any:
    """A figure with a panel per number of stages and batch."""
    figure, panels = new_figure(len(rows))
    stages = list(dict.fromkeys(row["stages"] for row in rows))
    columns = len(rows) // len(stages)
    heights = [len(row["ways"]) for row in rows[::columns]]
    figure.set_size_inches(6.4 * columns, 1.5 + 0.75 * sum(heights))
    grid = figure.add_gridspec(len(stages), columns, height_ratios=heights)
    for axes, place, row in zip(panels, grid, rows, strict=True):
        axes.set_subplotspec(place)
        _bars(axes, row)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=11, frameon=False)
    return figure


def ratio(row: dict, way: dict) -> Spread:
    """Time between tokens over full depth's, turn by turn."""
    return spread([t / full for t, full in zip(way["between"], row["ways"][0]["between"], strict=True)])


def _bars(axes: Any, row: dict) -> None:
    full = row["ways"][0]
    for position, way in enumerate(row["ways"]):
        s, share = spread(way["between"]), ratio(row, way).median
        of_full = way["timetable"] / full["timetable"]
        error = [[s.median - s.q25], [s.q75 - s.median]]
        axes.barh(position - 0.19, s.median, 0.36, color=MEASURED, label=_once("measured", position))
        axes.errorbar(s.median, position - 0.19, xerr=error, fmt="none", color="black", capsize=3)
        name = _once("timetable of the exits taken", position)
        axes.barh(position + 0.19, way["timetable"], 0.36, color=TIMETABLE, label=name)
        name = _once("stages x pass, no waiting", position)
        style = dict(color=ALONE, linestyle=":", linewidth=2.0, label=name)
        axes.vlines(way["alone"], position - 0.42, position + 0.42, **style)
        texts = (-0.19, s.q75, s.median, share), (0.19, *2 * [way["timetable"]], of_full)
        for offset, end, value, part in texts:
            place = dict(xytext=(8, 0), textcoords="offset points", va="center", fontsize=10)
            axes.annotate(f"{value:.0f} ms, {part:.2f}", (end, position + offset), **place)
    axes.set_yticks(range(len(row["ways"])), [way["name"] for way in row["ways"]])
    axes.set_ylim(len(row["ways"]) - 0.5, -0.5)
    axes.set_xlim(0, 1.35 * max(full["between"]))
    axes.grid(False, axis="y")
    sequences = "1 sequence" if row["batch"] == 1 else f"{row['batch']} sequences"
    label(axes, f"{row['stages']} stages, {sequences}", "ms between tokens, and ratio to full depth", "")


def _once(name: str, position: int) -> str | None:
    return name if position == 0 else None


def _times(rows: Sequence[dict]) -> str:
    header = ["batch", "exits", "left on stage 1, 2, …", "first token, ms", "between tokens, ms"]
    header += [
        "stages x pass, ms",
        "timetable, ms",
        "with real passes, ms",
        "of full depth's",
        "by timetable",
    ]
    lines = []
    for row in rows:
        full = row["ways"][0]
        for way in row["ways"]:
            lines.append(
                [
                    str(row["batch"]),
                    way["name"],
                    _shares(way, row["stages"]),
                    _cell(spread(way["first"]), 0),
                    _cell(spread(way["between"]), 1),
                    f"{way['alone']:.1f}",
                    f"**{way['timetable']:.1f}**",
                    f"{real_passes(row, way):.1f}",
                    _cell(ratio(row, way), 3),
                    f"**{way['timetable'] / full['timetable']:.3f}**",
                ]
            )
    return _table(header, lines)


def _shares(way: dict, stages: int) -> str:
    counts = Counter(stage for each in way["passed"] for stage in each[1:])
    return ", ".join(f"{counts[stage] / counts.total():.0%}" for stage in range(1, stages + 1))


def real_passes(row: dict, way: dict) -> float:
    """The timetable in ms with passes as long as they were, and a message after each."""
    took = fmean(way["slept"]) + fmean(way["computed"]) + row["message"]
    return way["timetable"] / row["unit"] * took


def _passes(rows: Sequence[dict]) -> str:
    lines = []
    for row in rows:
        for way in row["ways"]:
            parts = fmean(way["slept"]) - row["unit"], fmean(way["computed"])
            message = f"{row['message']:.1f}" if way is row["ways"][0] else ""
            batch = f"{row['stages']} x {row['batch']}"
            lines.append([batch, way["name"], *(f"{ms:.1f}" for ms in parts), message])
    return _table(["stages x batch", "exits", "sleep ends late", "computing", "message"], lines)


def _cell(s: Spread, digits: int) -> str:
    return f"{s.median:.{digits}f} ({s.q25:.{digits}f} to {s.q75:.{digits}f})"


def _table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---:", "---", *["---:"] * (len(header) - 2)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])
