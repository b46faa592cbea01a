# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The one report of all benchmarks: tables, one plot with error bars, and where the numbers come from.

    python scripts/benchmarks/report.py decoding docs/benchmarks/amd     # the page again, from decoding.jsonl there

Lists are shown as medians (quartiles); ratios are taken within repetitions and shown as medians with the 95 %
bootstrap interval of the median.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from harness import ROOT, load, name_of
from matplotlib.figure import Figure

from nemo_ee.files.output import write_text, write_with
from nemo_ee.report.page import table as markdown
from nemo_ee.report.page import with_interval, with_quartiles
from nemo_ee.report.schema import Interval
from nemo_ee.report.statistics import spread
from nemo_ee.report.style import FINAL_LINE_COLOUR, MARKERS, new_figure


def write_page(subject: str, folder: Path) -> str:
    """Writes SUBJECT.md and .png of SUBJECT.jsonl; returns the page: a template of docs/benchmarks/templates with the
    settings and what the subject's `page` makes of the rows."""
    rows = load(folder / f"{subject}.jsonl")
    values, figure = import_module(subject).page(rows)
    template = (ROOT / "docs" / "benchmarks" / "templates" / f"{subject}.md").read_text()
    text = template.format(provenance=provenance(rows), **{**rows[0]["settings"], **values})
    if figure is not None:
        write_with(folder / f"{subject}.png", partial(figure.savefig, format="png"))
    write_text(folder / f"{subject}.md", text)
    return text


def provenance(rows: Sequence[Mapping]) -> str:
    """Commands, and where and when they ran."""
    every = [row["about"] for row in rows]

    def once(key: str, joined: str = ", ") -> str:
        return joined.join(dict.fromkeys(each[key] for each in every if each.get(key)))

    loads = sorted(float(each["load"]) for each in every)
    torch = f", torch {once('torch')}" if once("torch") else ""
    commands = "\n\n".join(f"`{each}`" for each in dict.fromkeys(each["command"] for each in every))
    return f"""{commands}

Measured at commit {once("commit")}. {once("device", "; ")}{torch}; load averages from {loads[0]:.1f} to {loads[-1]:.1f}
at the end of cases. {max(each["date"] for each in every)}."""


def interval(values: Sequence[float], statistic: Callable = np.median) -> dict[str, float]:
    """A statistic of values, and its 95 % interval by bootstrap."""
    drawn = np.random.default_rng(0).choice(np.asarray(values), (2000, len(values)))
    low, high = np.quantile(statistic(drawn, axis=1), [0.025, 0.975])
    return {"value": float(statistic(values)), "low": float(low), "high": float(high)}


def ratio(ways: Mapping[str, Mapping], name: str, over: str, metric: str) -> dict[str, float] | None:
    """A way's metric over another's, within repetitions that have both; None where there are none."""
    mine, base = ways.get(name, {}).get(metric, []), ways.get(over, {}).get(metric, [])
    pairs = [a / b for a, b in zip(mine, base, strict=False) if a is not None and b is not None]
    return interval(pairs) if pairs else None


def cell(value: Any, digits: int = 2) -> str:
    """What a table says of a value of a row."""
    if isinstance(value, dict):
        return with_interval(value["value"], Interval(value["low"], value["high"]), digits)
    if isinstance(value, list):
        return with_quartiles(spread([each for each in value if each is not None]), digits)
    return "" if value is None else value if isinstance(value, str) else f"{value:,.{digits}f}"


@dataclass(frozen=True)
class Column:
    """Of a table: title, metric of ways, digits behind the point, and the way that it is divided by, if any."""

    title: str
    metric: str
    digits: int = 2
    over: str | None = None

    def cell(self, ways: Mapping[str, Mapping], name: str) -> str:
        """Of a way."""
        value = ways[name].get(self.metric)
        return cell(value if self.over is None else ratio(ways, name, self.over, self.metric), self.digits)


def columns(digits: Mapping[str, int]) -> list[Column]:
    """Metrics as they are, with so many digits behind the point."""
    return [Column(name, name, number) for name, number in digits.items()]


def table(
    rows: Iterable[Mapping],
    columns: Sequence[Column],
    group: str = "ways",
    case: str | None = "case",
    way: str | None = "way",
    only: Callable[[str], bool] = lambda name: True,
) -> str:
    """A line per case and way. `group` is one of the rows; `case` and `way` are titles of the columns that name them,
    None for no such column; `only` says whether a way is shown."""
    titles = [title for title in (case, way) if title] + [column.title for column in columns]
    lines = [
        [name_of(row["case"])] * bool(case) + [name] * bool(way) + [c.cell(row[group], name) for c in columns]
        for row in rows
        for name in row.get(group, {})
        if only(name)
    ]
    return markdown(titles, lines)


def plot(points: Iterable[tuple[str, str, Mapping]], axis: str, line: float | None = None) -> Figure:
    """Values with their intervals: a line per name, a colour per series. Points are name, series and {value, low,
    high}; `line` is a value to compare with."""
    points = list(points)
    names, series = (list(dict.fromkeys(point[part] for point in points)) for part in (0, 1))
    figure, (axes,) = new_figure(1, width=10.0, height=1.6 + max(0.3, 0.13 * len(series)) * len(names))
    for number, each in enumerate(series):
        mine = [(names.index(name), value) for name, which, value in points if which == each]
        shift = 0.6 * ((number + 0.5) / len(series) - 0.5)
        middle = [value["value"] for _, value in mine]
        bars = [[v["value"] - v["low"] for _, v in mine], [v["high"] - v["value"] for _, v in mine]]
        look = {"fmt": MARKERS[number % len(MARKERS)], "color": f"C{number % 10}", "capsize": 3}
        axes.errorbar(middle, [at + shift for at, _ in mine], xerr=np.maximum(bars, 0), label=each, **look)
    if line is not None:
        axes.axvline(line, color=FINAL_LINE_COLOUR, linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(axis, fontsize=11)
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=3, fontsize=10, frameon=False)
    return figure


if __name__ == "__main__":
    print(write_page(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "docs/benchmarks")))
