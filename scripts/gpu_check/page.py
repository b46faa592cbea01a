# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What check_gpu.sh prints, and the page and plot that it writes."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ee.files.output import write_text, write_with
from nemo_ee.report.page import table as markdown

if TYPE_CHECKING:
    from check import Outcome

PRETEND = (
    "**From a pretend GPU of the tests, which computes on the CPU: the figures mean nothing, and nothing here was seen "
    "on a GPU.**"
)
FIRST_RATE = "tokens/s"


def table(outcomes: Sequence["Outcome"]) -> str:
    """Everything that was looked at, in Markdown: part, what, and what it came to."""
    rows = []
    for outcome in outcomes:
        state = "FAILED" if outcome.result.faults else "passed"
        rows += [(outcome.part.name, what, found) for what, found in outcome.result.lines]
        rows.append((outcome.part.name, "all", f"{state} in {outcome.seconds:.0f} s"))
        rows += [(outcome.part.name, "fault", fault) for fault in outcome.result.faults]
    rows = [[" ".join(cell.split()) for cell in row] for row in rows]
    return markdown(("part", "what", "found"), rows, numbers=False, padded=True)


def write(outcomes: Sequence["Outcome"], output: Path, options: Sequence[str]) -> Path:
    """Writes `gpu.md`, and `gpu.png` beside it where anything was timed; returns the page.

    Args:
        outcomes: of all parts.
        output: directory.
        options: that the script was given, without folders.
    """
    facts = {key: value for outcome in outcomes for key, value in outcome.result.facts.items()}
    speeds = [speed for outcome in outcomes for speed in outcome.result.speeds]
    failed = [outcome.part.name for outcome in outcomes if outcome.result.faults]
    pretend = facts.pop("pretend", None)
    lines = ["# On a GPU", ""]
    lines += [PRETEND, ""] if pretend else []
    lines += ["Tiny shapes (`--quick`): the figures mean nothing.", ""] if "--quick" in options else []
    lines += [f"**Failed: {', '.join(failed)}.** See the faults below.", ""] if failed else []
    lines += [f"Written by `{' '.join(['bash scripts/check_gpu.sh', *options])}`.", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    if speeds:
        figure = plot(speeds)
        warning = "FIGURES MEAN NOTHING: " if pretend or "--quick" in options else ""
        figure.suptitle(f"{warning}{facts.get('GPU', 'unknown GPU')}", fontsize=11)
        write_with(output / "gpu.png", partial(figure.savefig, format="png"))
        lines += ["", "## Decoding", "", EXPLAINED, "", speed_table(speeds), "", "![decoding](gpu.png)"]
    lines += ["", "## All that was checked", "", table(outcomes)]
    return write_text(output / "gpu.md", "\n".join(lines) + "\n")


EXPLAINED = """\
Greedy, bfloat16. Rates are of all sequences together, behind the first token: medians and quartiles of repetitions in
which all ways take turns on the same prompts. *transformers* is its `generate` as it comes, with the same weights:
torch's attention, a cache that grows, nothing compiled. The *limit* is the time to read the weights that full depth
needs once per step, and every sequence's keys and values, at the bandwidth of a large copy; exits read less, so they
may exceed it. *Same text*: tokens before the first difference from full depth without graphs. bfloat16 alone makes
equal ways part, since a pass of several tokens rounds otherwise than one of one token. *Left*: the share of tokens by
the layer that they left at; of lossless, the accepted share of drafts. *Eager*: passes through layers and heads that
no graph ran, prompts included."""


def speed_table(speeds: Sequence[dict]) -> str:
    """In Markdown, one row per way."""
    from nemo_ee.report.statistics import spread

    columns = (
        "model",
        "batch",
        "way",
        FIRST_RATE,
        "quartiles",
        "of the limit",
        "x transformers",
        "same text",
    )
    columns += ("left", "eager")
    rows = []
    for speed in speeds:
        s = spread(speed["rates"])
        left = ", ".join(f"{layer}: {share:.0%}" for layer, share in speed["left"].items())
        cells = [
            speed["model"],
            str(speed["batch"]),
            speed["name"],
            f"{s.median:.0f}",
            f"{s.q25:.0f} to {s.q75:.0f}",
            f"{s.median / speed['limit']:.0%}",
            f"{s.median / theirs(speed, speeds):.2f}",
            f"{speed['same']:.0%}",
            left or ("" if speed["graphs"] is None else "no drafts"),
            "" if speed["eager"] is None else f"{speed['eager']:.1%}",
        ]
        rows.append(cells)
    return markdown(columns, rows, numbers=False)


def theirs(speed: dict, speeds: Sequence[dict]) -> float:
    """The rate of transformers for the same model and batch size."""
    from nemo_ee.report.statistics import spread

    same = [s for s in speeds if (s["model"], s["batch"]) == (speed["model"], speed["batch"])]
    return spread(next(s["rates"] for s in same if s["graphs"] is None)).median


def plot(speeds: Sequence[dict]) -> Any:
    """A panel per model and batch size: rates with their quartiles, and the limit."""
    from matplotlib.ticker import MaxNLocator

    from nemo_ee.report.statistics import spread
    from nemo_ee.report.style import FINAL_LINE_COLOUR, label, new_figure

    cases = list(dict.fromkeys((speed["model"], speed["batch"]) for speed in speeds))
    figure, panels = new_figure(len(cases))
    for (model, batch), axes in zip(cases, panels, strict=True):
        mine = [speed for speed in speeds if (speed["model"], speed["batch"]) == (model, batch)][::-1]
        for place, speed in enumerate(mine):
            s = spread(speed["rates"])
            error = [[s.median - s.q25], [s.q75 - s.median]]
            colour = {True: "#0072b2", False: "#56b4e9", None: "#d55e00"}[speed["graphs"]]
            axes.barh(place, s.median, xerr=error, color=colour, capsize=3)
        axes.set_yticks(range(len(mine)), [speed["name"] for speed in mine])
        axes.axvline(
            mine[0]["limit"], color=FINAL_LINE_COLOUR, linestyle="--", label="bandwidth limit, full depth"
        )
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.legend(fontsize=9, frameon=False)
        label(axes, f"{model}\nbatch {batch}", FIRST_RATE, "")
    return figure
