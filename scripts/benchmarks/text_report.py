# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The page and the plot of text_recipes.py."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from nemo_ee.files.output import write_text, write_with
from nemo_ee.report.markdown import table
from nemo_ee.report.style import MARKERS, label, new_figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def write_page(rows: Sequence[dict], directory: Path) -> str:
    """Writes text_recipes.md and text_recipes.png; returns the page.

    Args:
        rows: of text_recipes.json.
        directory: where to.
    """
    done = [row for row in rows if "measured" in row]
    page = _page(done)
    write_with(directory / "text_recipes.png", partial(_plot(done).savefig, format="png"))
    write_text(directory / "text_recipes.md", page)
    return page


def _page(rows: Sequence[dict]) -> str:
    first = rows[0]
    measured = first["measured"]
    loads = sorted(float(row[part]["load"]) for row in rows for part in ("tuned", "measured"))
    tokens = measured["thresholds"][0]["tokens"]
    return f"""# Text to tune exits on: articles, or the model's own answers, at equal time

`{first["command"]}`

Commit {first["commit"]}. {first["device"]}. {measured["date"]}. bf16 while tuning, float32 where measured.

Each recipe got {first["minutes"]:g} minutes of two cores, as processor time of one thread
({first["minutes"] * 120:.0f} s), for letting the model answer prompts, the closed form and tuning together; tuning got
as many steps as fitted into what was left. The clock of the machine was of no use: its load average was
{loads[0]:.0f} to {loads[-1]:.0f} meanwhile. Waiting for memory while others use it counts as processor time, too, so
that the seconds per step below, and with them the numbers of steps, differ from run to run.

The prompts that were answered are questions of GSM8K and BoolQ and about titles of Wikipedia
(`scripts/generate_tuning_text.py`); loss and closed form are those of answers alone. What is measured is
`scripts/benchmarks/held_out_prompts.jsonl`: {measured["prompts"]} prompts of eight kinds, none of them among those
that were answered for tuning, with full depth's own greedy answers of at most 128 tokens ({measured["ended"]} of
them ended before); and {measured["articles"][0]["tokens"]:,} tokens of held-out articles. Brackets are 95 % bootstrap
intervals over prompts, or over pieces of articles. One run of each recipe: differences between recipes are subject to
the noise of tuning as well, which intervals over prompts do not show. `scripts/quickstart.sh` begins with the closed
form on articles and tunes on answers.

## Every token at one exit

Share of tokens at which the exit's most probable token is the final exit's, on {tokens:,} tokens of answers.

{table(["recipe", *_layers(first, "answers"), *_layers(first, "articles")], [_agreements(row) for row in rows])}

{_differences(rows)}

## By thresholds, on the answers

Agreement with full depth's answers if tokens leave at the first exit that is surer than the threshold; the share of
tokens that do; and the share of all layers that they leave out (some of these are caught up on later, in passes of
several tokens).

{table(["recipe", "threshold", "agreement", "leave early", "layers left out"], _by_threshold(rows))}

What that comes to at equal agreement, read off between the two nearest thresholds:

{table(_AT_AGREEMENT, [_at_agreement(row) for row in rows])}

![Agreement against tokens that leave early](text_recipes.png)

## What it took

Processor seconds of one thread.

{table(_COSTS, [_cost(row) for row in rows])}
"""


_COSTS = [
    "recipe",
    "writing answers, s",
    "tokens written",
    "answers",
    "closed form, s",
    "tuning, s",
    "steps",
    "s/step",
    "tokens that count, each time they are read",
]


def _layers(row: dict, part: str) -> list[str]:
    return [f"{part}, exit {each['layer']}" for each in row["measured"][part]]


def _with_interval(value: float, interval: dict | None) -> str:
    return f"{value:.3f}" + (f" [{interval['low']:.3f}, {interval['high']:.3f}]" if interval else "")


def _agreements(row: dict) -> list[str]:
    cells = [each for part in ("answers", "articles") for each in row["measured"][part]]
    return [row["name"], *(_with_interval(each["agreement"], each["agreement_ci"]) for each in cells)]


def _differences(rows: Sequence[dict]) -> str:
    """Every other recipe against the first, prompt by prompt."""
    first, lines = rows[0], []
    for row in rows[1:]:
        for each in row["measured"]["answers"]:
            one, other = (which["measured"]["per_prompt"] for which in (first, row))
            counts = (
                one["agreeing"][str(each["layer"])],
                other["agreeing"][str(each["layer"])],
                one["tokens"],
            )
            mean, low, high = paired_difference(*map(np.array, counts))
            lines.append([row["name"], str(each["layer"]), f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"])
    if not lines:
        return ""
    head = f"Agreement on answers less that of {first['name']}, of the same prompts:"
    return f"{head}\n\n" + table(["recipe", "exit", "difference"], lines)


def paired_difference(one: np.ndarray, other: np.ndarray, tokens: np.ndarray) -> tuple[float, float, float]:
    """How much more often the other agrees, per token, with its 95 % bootstrap interval over prompts.

    Args:
        one: agreeing tokens of each prompt, [P].
        other: likewise.
        tokens: of each prompt.
    """
    gained = other - one
    drawn = np.random.default_rng(0).integers(len(tokens), size=(2000, len(tokens)))
    low, high = np.quantile(gained[drawn].sum(1) / tokens[drawn].sum(1), [0.025, 0.975])
    return float(gained.sum() / tokens.sum()), float(low), float(high)


def _by_threshold(rows: Sequence[dict]) -> list[list[str]]:
    lines = []
    for number in range(len(rows[0]["measured"]["thresholds"])):
        for row in rows:
            at = row["measured"]["thresholds"][number]
            agreement = _with_interval(at["agreement"], at["agreement_ci"])
            shares = [f"{100 * at[name]:.1f} %" for name in ("early", "layers_left_out")]
            lines.append([row["name"], f"{at['threshold']:g}", agreement, *shares])
    return lines


_LEVELS = (0.9, 0.95)
_AT_AGREEMENT = [
    "recipe",
    *(f"{what} at {level}" for level in _LEVELS for what in ("leave early", "layers left out")),
]


def _at_agreement(row: dict) -> list[str]:
    points = sorted(row["measured"]["thresholds"], key=lambda at: at["agreement"])
    agreement = [at["agreement"] for at in points]
    shares = [
        np.interp(level, agreement, [at[name] for at in points])
        for level in _LEVELS
        for name in ("early", "layers_left_out")
    ]
    return [row["name"], *(f"{100 * share:.1f} %" for share in shares)]


def _cost(row: dict) -> list[str]:
    written, run = row.get("written"), row["tuned"]
    cells = (
        [f"{written['seconds']:.0f}", f"{written['tokens']:,}", f"{written['answers']:,}"]
        if written
        else [""] * 3
    )
    counted = run["samples"] * run["tokens_per_sample"]
    return [
        row["name"],
        *cells,
        f"{row['started']['before']:.0f}",
        f"{run['all']:.0f}",
        f"{run['steps']:,}",
        f"{run['per_step']:.2f}",
        f"{counted:,.0f}",
    ]


def _plot(rows: Sequence[dict]):
    figure, (axes,) = new_figure(1, width=8.0, height=5.8)
    for row, colour, marker in zip(rows, COLOURS, MARKERS, strict=False):
        points = row["measured"]["thresholds"]
        early = [100 * at["early"] for at in points]
        agreement = [at["agreement"] for at in points]
        around = [at["agreement_ci"] or {"low": at["agreement"], "high": at["agreement"]} for at in points]
        bars = [
            [value - each["low"] for value, each in zip(agreement, around, strict=True)],
            [each["high"] - value for value, each in zip(agreement, around, strict=True)],
        ]
        look = {"color": colour, "marker": marker, "markersize": 6, "capsize": 3, "linewidth": 1.5}
        axes.errorbar(early, agreement, yerr=bars, label=row["name"], **look)
        for x, y, at in zip(early, agreement, points, strict=True):
            axes.annotate(
                f"{at['threshold']:g}", (x, y), xytext=(5, 6), textcoords="offset points", fontsize=10
            )
    label(
        axes,
        "On full depth's own answers, by thresholds",
        "tokens that leave early, %",
        "agreement with full depth",
    )
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1, fontsize=11, frameon=False)
    return figure
