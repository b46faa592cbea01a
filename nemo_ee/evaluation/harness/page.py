# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The page of a sweep: what was scored at which threshold, how fast, and how alike to full depth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nemo_ee.files.output import write_text, write_with
from nemo_ee.report.page import escaped, page, provenance, table, with_interval, with_quartiles
from nemo_ee.report.schema import Interval, Metadata, Spread
from nemo_ee.report.serialise import to_json
from nemo_ee.report.style import FINAL_LINE_COLOUR, label, new_figure

NAME = "lm_eval"
"""Of the page, its plot and its numbers."""


@dataclass(frozen=True)
class WayResult:
    """A task in one way.

    Attributes:
        way: `full depth`, or the threshold.
        threshold: None at full depth.
        scores: metric -> value and its standard error, None where the harness gives none; metrics as the harness calls
            them, with the filter.
        left: share of generated tokens that left early, the first of each text included, which never does; None for
            tasks without generation, as are those that follow.
        layers: share of all layers that these tokens ran through before they left.
        agreement: share of full depth's tokens that would have been the same, given those before.
        agreement_ci: its 95 % interval over examples.
        same: share of full depth's texts that are said again, of those that go on behind their first token.
        tokens_per_second: over examples, behind prompt and first step; None where no text goes on behind that.
        speedup: against full depth on the same example; likewise.
    """

    way: str
    threshold: float | None
    scores: Mapping[str, tuple[float, float | None]]
    left: float | None = None
    layers: float | None = None
    agreement: float | None = None
    agreement_ci: Interval | None = None
    same: float | None = None
    tokens_per_second: Spread | None = None
    speedup: Spread | None = None


@dataclass(frozen=True)
class TaskResult:
    """A task in all ways.

    Attributes:
        task: its name.
        examples: their number.
        num_fewshot: solved ones in front of each.
        ways: full depth first.
        at_once: texts that full depth ends with their first token, which never leaves early.
    """

    task: str
    examples: int
    num_fewshot: int
    ways: tuple[WayResult, ...]
    at_once: int = 0


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found.

    Attributes:
        metadata: where the numbers come from.
        exits: layers of the exits in use.
        harness: version of lm-evaluation-harness.
        excluded: whether questions that exits were tuned on were left out.
        tasks: in the order in which they were asked for.
    """

    metadata: Metadata
    exits: tuple[int, ...]
    harness: str
    excluded: bool
    tasks: tuple[TaskResult, ...]


def write_page(result: SweepResult, directory: str | Path) -> list[Path]:
    """Writes `lm_eval.json`, its plot and the page, each in one step; returns their paths.

    Raises:
        OutputError: they cannot be written.
    """
    directory = Path(directory)
    figure = plot(result)
    return [
        write_text(directory / f"{NAME}.json", to_json(result, "sweep")),
        write_with(directory / f"{NAME}.png", partial(figure.savefig, format="png")),
        write_text(directory / f"{NAME}.md", to_markdown(result)),
    ]


def to_markdown(result: SweepResult) -> str:
    """The page."""
    about = result.metadata
    rows = [
        ("model", f"{about.model} ({about.num_layers} layers)"),
        ("exits", f"{about.adapter or 'part of the model'}, layers {', '.join(map(str, result.exits))}"),
        ("lm-evaluation-harness", result.harness),
        *provenance(about),
    ]
    note = (
        "Every example is answered greedily, by itself, at full depth and at all thresholds in turn, before the next "
        "one is. Exits are asked for every token. A threshold is one for all exits; 1 asks none, so that its row says "
        "how far two runs of the same differ. Scores are the harness's, with their standard errors. Speeds are medians "
        "over examples with quartiles, of the tokens behind prompt and first step, which exits do not shorten; the "
        "speed-up is against full depth on the same example. Agreement is teacher-forced: the share of full depth's "
        "tokens that would have been the same, with its 95 % interval over examples. A text is equal where all its "
        "tokens are; those that full depth ends with their first token do not count, since that never leaves early. "
        "In tasks that compare given answers, exits score each token of them by the first exit that is "
        "sure, and save no time."
    )
    if result.excluded:
        note += " Questions that the exits were tuned on are left out of BoolQ and GSM8K."
    sections = [
        f"# lm-evaluation-harness by thresholds: {escaped(about.model)}",
        table(["", "value"], rows, numbers=False),
        note,
        *map(_section, result.tasks),
    ]
    return page(sections, {f"{NAME}.png": "Score against speed"})


def _section(task: TaskResult) -> str:
    metrics = list(task.ways[0].scores)
    generates = task.ways[0].left is not None
    header = ["threshold", *map(metric_name, metrics)]
    if generates:
        header += ["speed-up", "tokens/s", "left early", "layers run", "agreement", "equal texts"]
    rows = [
        [way.way, *(_score(way.scores[name]) for name in metrics), *_generation(way)] for way in task.ways
    ]
    shots = f", {task.num_fewshot} solved ones in front of each" if task.num_fewshot else ""
    said = f"{task.examples} examples{shots}."
    if task.at_once:
        said += f" {task.at_once} of them are answered by one token at full depth: exits have no say there."
    return f"## {escaped(task.task)}\n\n{said}\n\n{table(header, rows)}"


def _generation(way: WayResult) -> list[str]:
    if way.left is None:
        return []
    shares = [f"{100 * (value or 0.0):.0f} %" for value in (way.left, way.layers)]
    agreement = with_interval(way.agreement or 0.0, way.agreement_ci, 3)
    speeds = [
        "" if speed is None else with_quartiles(speed, digits)
        for speed, digits in ((way.speedup, 2), (way.tokens_per_second, 1))
    ]
    return [*speeds, *shares, agreement, "" if way.same is None else f"{100 * way.same:.0f} %"]


def _score(score: tuple[float, float | None]) -> str:
    value, error = score
    return f"{value:,.3f}" if error is None else f"{value:,.3f} ± {error:,.3f}"


def metric_name(name: str) -> str:
    """The harness's `metric,filter` for people."""
    metric, _, kind = name.partition(",")
    return metric if kind in ("", "none") else f"{metric} ({kind})"


def plot(result: SweepResult) -> Figure:
    """A panel per task: its first score against the speed-up; the agreement where code is not run; and by threshold
    where nothing is generated."""
    figure, panels = new_figure(len(result.tasks), width=4.8)
    for axes, task in zip(panels, result.tasks, strict=True):
        full, others = task.ways[0], task.ways[1:]
        if full.speedup is not None:
            others = tuple(way for way in others if way.speedup is not None)
        name = next(iter(full.scores), "characters")
        by_agreement = name.startswith("characters")
        y = "agreement with full depth" if by_agreement else metric_name(name)
        values = [way.agreement or 0.0 if by_agreement else way.scores[name][0] for way in others]
        errors = [0.0 if by_agreement else way.scores[name][1] or 0.0 for way in others]
        if full.speedup is None:
            x, places, bars = "threshold", [way.threshold or 0.0 for way in others], None
        else:
            spreads = [way.speedup for way in others if way.speedup is not None]
            x, places = "tokens/s relative to full depth (bars: quartiles)", [each.median for each in spreads]
            bars = [[s.median - s.q25 for s in spreads], [s.q75 - s.median for s in spreads]]
            axes.axvline(1.0, color=FINAL_LINE_COLOUR, linestyle=":", linewidth=1.2)
        look = {
            "fmt": "o-",
            "color": "#0072b2",
            "markersize": 5,
            "linewidth": 1.0,
            "capsize": 2,
            "elinewidth": 0.8,
        }
        axes.errorbar(places, values, xerr=bars, yerr=errors, **look)
        for place, value, way in _named(places, values, others):
            axes.annotate(way.way, (place, value), xytext=(5, 5), textcoords="offset points", fontsize=9)
        axes.axhline(1.0 if by_agreement else full.scores[name][0], color=FINAL_LINE_COLOUR, linestyle="--")
        label(axes, task.task, x, y)
    return figure


def _named(
    places: Sequence[float], values: Sequence[float], ways: Sequence[WayResult]
) -> list[tuple[float, float, Any]]:
    """Of many points every fourth has its name beside it."""
    step = 1 if len(ways) <= 8 else 4
    return list(zip(places, values, ways, strict=True))[::step]
