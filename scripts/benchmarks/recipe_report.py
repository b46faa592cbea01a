# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The page and the plot of exit_recipes.py."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from nemo_ee.files.output import write_text, write_with
from nemo_ee.report.style import label, layer_colours, new_figure


def write_page(rows: Sequence[dict], order: Sequence[str], directory: Path) -> str:
    """Writes exit_recipes.md and exit_recipes.png; returns the page.

    Args:
        rows: of exit_recipes.json.
        order: names of recipes.
        directory: where to.
    """
    by_name = {row["name"]: row for row in rows}
    recipes = [by_name[name] for name in order if name in by_name]
    page = _page(recipes, by_name["costs"])
    write_with(directory / "exit_recipes.png", partial(_plot(recipes).savefig, format="png"))
    write_text(directory / "exit_recipes.md", page)
    return page


def _page(recipes: Sequence[dict], costs: dict) -> str:
    first = recipes[0]
    layers = [quality["layer"] for quality in first["end"]]
    tokens = first["end"][0]["tokens"]
    header = ["recipe"]
    for layer in layers:
        header += [f"exit {layer}, no steps", f"exit {layer}, tuned", "strict", "loss"]
    header.append("tuning, s")
    lines = [[row["name"], *_cells(row), f"{row['tuning_seconds']:.0f}"] for row in recipes]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in [*recipes, costs]))
    loads = [float(row["load"]) for row in recipes]
    return f"""# Recipes for exits, at equal tokens

`{first["command"]}`

Commit {commits}. {first["device"]}. {first["date"]}. {first["precision"]}, seed {first["seed"]}.

Each recipe is `conf/megatron_gpt_ee_tuning.yaml` with the keys named; the first is that file as it is. The
closed form reads {first["fitted_tokens"]:,} tokens, tuning {first["tuned_tokens"]:,}. Documents were split
into tuning and held-out text before anything was fitted. The frozen backbone runs once and its states are
kept for all recipes, so *tuning, s* is the time of both exits and of the final exit's logits; of the first
recipe it includes the backbone. It was taken recipe after recipe on a shared machine, at load averages from
{min(loads):.1f} to {max(loads):.1f}: compare projections by the second table.

## Agreement with the final exit

On {tokens:,} held-out tokens, the exit's most probable token that it can emit against the final exit's;
brackets are 95 % bootstrap intervals over sequences. *No steps*: after initialisation (for ridge, the closed
form) alone. *Strict*: a position where a shortlist's bucket is most probable counts as disagreement. *Loss*:
cross-entropy against the text in nats per token; for a shortlist, tokens off it count as its bucket, so
losses of different projections do not compare.

{_table(header, lines)}

![Agreement of every recipe](exit_recipes.png)

## Time per token of one exit

Median (quartiles), all projections timed in turn in one process, load average {costs["load"]}. Tuning:
forward and backward of one exit on 512 tokens and the final exit's logits, which distillation needs once for
all exits. Decoding: one token at batch 1 through the exit's modules, logits and confidence, fp32.

{_table(["projection", "tuning, ms/token", "decoding, ms/token"], [_cost(each) for each in costs["costs"]])}
"""


def _cells(row: dict) -> list[str]:
    cells = []
    for start, end in zip(row["start"], row["end"], strict=True):
        interval = end["agreement_ci"]
        around = f" [{interval['low']:.3f}, {interval['high']:.3f}]" if interval else ""
        cells += [f"{start['agreement']:.3f}", f"{end['agreement']:.3f}{around}"]
        cells += [f"{end['strict_agreement']:.3f}", f"{end['loss']:.2f}"]
    return cells


def _cost(cost: dict) -> list[str]:
    return [
        cost["projection"],
        *(
            f"{s['median']:.3f} ({s['q25']:.3f} to {s['q75']:.3f})"
            for s in (cost["tuning"], cost["decoding"])
        ),
    ]


def _table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])


def _plot(recipes: Sequence[dict]):
    layers = [quality["layer"] for quality in recipes[0]["end"]]
    colours = layer_colours(layers, 0)
    figure, panels = new_figure(len(layers), width=6.4, height=1.6 + 0.42 * len(recipes))
    for index, (axes, layer) in enumerate(zip(panels, layers, strict=True)):
        for position, row in enumerate(recipes):
            start, end = row["start"][index], row["end"][index]
            interval = end["agreement_ci"] or {"low": end["agreement"], "high": end["agreement"]}
            axes.plot(
                [start["agreement"], end["agreement"]],
                [position] * 2,
                color="#cccccc",
                linewidth=1.5,
                zorder=1,
            )
            axes.plot(start["agreement"], position, "o", markerfacecolor="white", color=colours[layer])
            axes.errorbar(
                end["agreement"],
                position,
                xerr=[[end["agreement"] - interval["low"]], [interval["high"] - end["agreement"]]],
                fmt="o",
                color=colours[layer],
                capsize=4,
            )
        axes.set_yticks(range(len(recipes)), [row["name"] for row in recipes] if index == 0 else [])
        axes.set_ylim(len(recipes) - 0.5, -0.5)
        label(axes, f"Exit {layer}", "agreement with the final exit", "")
    dot = {"linestyle": "", "marker": "o", "color": "#444444"}
    handles = [
        panels[0].plot([], [], markerfacecolor="white", label="after initialisation", **dot)[0],
        panels[0].plot([], [], label="tuned (bars: 95 % interval)", **dot)[0],
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=11, frameon=False)
    return figure
