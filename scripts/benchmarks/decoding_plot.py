# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The plot of decoding.py."""

from collections.abc import Sequence
from typing import Any

from decoding_results import decoding_rates, over_passes, ratio, roofline, speculation, way_of
from decoding_ways import ASSISTED, BF16, BF16_LOSSLESS, EXITS, FULL, HUGGING_FACE, INT8, LOSSLESS, NEMO

from nemo_ee.report.statistics import spread
from nemo_ee.report.style import FINAL_LINE_COLOUR, MARKERS, label, new_figure

COLOURS = {
    FULL: FINAL_LINE_COLOUR,
    EXITS: "#0072b2",
    LOSSLESS: "#cc79a7",
    BF16: "#999999",
    BF16_LOSSLESS: "#882255",
    INT8: "#e69f00",
    NEMO: "#009e73",
    HUGGING_FACE: "#d55e00",
    ASSISTED: "#8c3b00",
}
LINE = "#444444"


def plot(rows: Sequence[dict]) -> Any:
    """A figure of two by two panels; the last is empty without lossless decoding."""
    names = list(dict.fromkeys(way["name"] for row in rows for way in row["ways"]))
    figure, panels = new_figure(4)
    figure.set_size_inches(13.0, 6.0 + 0.5 * len(names))
    for axes, place in zip(panels, figure.add_gridspec(2, 2), strict=True):
        axes.set_subplotspec(place)
    speed, batches, passes, lossless = panels
    _speed(speed, [row for row in rows if row["batch"] == rows[0]["batch"]], names)
    _batches(batches, [row for row in rows if row["prompt"] == rows[0]["prompt"]], names)
    _passes(passes, rows)
    _lossless(lossless, rows)
    for axes, columns in ((speed, 2), (batches, 3), (passes, 3)):
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.13), fontsize=10, frameon=False, ncols=columns
        )
    return figure


def _speed(axes: Any, rows: Sequence[dict], names: list[str]) -> None:
    for index, row in enumerate(rows):
        offset = 0.3 * (index - (len(rows) - 1) / 2)
        for way in row["ways"]:
            s = spread(list(decoding_rates(row, way).values()))
            axes.errorbar(
                s.median,
                names.index(way["name"]) + offset,
                xerr=[[s.median - s.q25], [s.q75 - s.median]],
                fmt=MARKERS[index],
                color=COLOURS[way["kind"]],
                capsize=3,
            )
        style = dict(color=LINE, linestyle=("-", "--", ":")[index % 3], linewidth=1.2)
        axes.axvline(roofline(row), label=f"roofline, prompt {row['prompt']}", **style)
        axes.plot([], [], MARKERS[index], color=LINE, label=f"measured, prompt {row['prompt']}")
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(False, axis="y")
    label(axes, f"Speed at batch {rows[0]['batch']}", "tokens/s after the first (bars: quartiles)", "")


def _batches(axes: Any, rows: Sequence[dict], names: list[str]) -> None:
    for index, name in enumerate(names):
        points = [
            (row["batch"], ratio(row, way, way_of(row, FULL)).median)
            for row in rows
            if (way := way_of(row, name)) is not None
        ]
        if len(points) and name != FULL:
            kind = next(way["kind"] for row in rows for way in row["ways"] if way["name"] == name)
            style = dict(color=COLOURS[kind], marker=MARKERS[index % len(MARKERS)], linewidth=1.2)
            axes.plot(*zip(*points, strict=True), label=_short(name), **style)
    axes.axhline(1.0, color=FINAL_LINE_COLOUR, linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["batch"] for row in rows], [str(row["batch"]) for row in rows])
    axes.set_ylim(bottom=0)
    label(axes, f"Against our full depth, prompt {rows[0]['prompt']}", "batch", "tokens/s over full depth's")


def _passes(axes: Any, rows: Sequence[dict]) -> None:
    shown = set()
    for position, row in enumerate(rows):
        ways = [way for way in row["ways"] if over_passes(row, way) is not None]
        for index, way in enumerate(ways):
            s = over_passes(row, way)
            axes.errorbar(
                s.median,
                position + 0.7 * ((index + 0.5) / len(ways) - 0.5),
                xerr=[[s.median - s.q25], [s.q75 - s.median]],
                fmt="o",
                markersize=5,
                color=COLOURS[way["kind"]],
                label=None if way["kind"] in shown else way["kind"],
            )
            shown.add(way["kind"])
    axes.axvline(1.0, color=LINE, linewidth=1.0)
    axes.axvline(1.1, color=LINE, linewidth=1.2, linestyle="--")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(False, axis="y")
    label(axes, "Time over the sum of its passes (limit 1.1)", "measured / sum of passes", "")


def _lossless(axes: Any, rows: Sequence[dict]) -> None:
    found = []
    for row in rows:
        for way in (way for way in row["ways"] if way["kind"] == LOSSLESS):
            if (each := speculation(row, way)) is not None:
                found.append((each.speedup, ratio(row, way, way_of(row, FULL)), row, way))
    for predicted, s, row, way in found:
        axes.errorbar(
            predicted,
            s.median,
            yerr=[[s.median - s.q25], [s.q75 - s.median]],
            fmt="o",
            color=COLOURS[LOSSLESS],
        )
        text = f"{way['threshold']:g}, b {row['batch']}, p {row['prompt']}"
        axes.annotate(text, (predicted, s.median), (5, 4), textcoords="offset points", fontsize=9)
    title = "Lossless: speed-up over full depth"
    label(axes, title, "predicted from acceptance (threshold, batch, prompt)", "measured")
    if not found:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, fontsize=12)
        return
    axes.axline((1, 1), slope=1, color=LINE, linewidth=1.0)
    axes.axhline(1.0, color=FINAL_LINE_COLOUR, linewidth=1.0)
    axes.axvline(1.0, color=FINAL_LINE_COLOUR, linewidth=1.0)


def _short(name: str) -> str:
    return name.replace(ASSISTED, "HF assistant").replace(HUGGING_FACE, "HF")
