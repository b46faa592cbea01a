# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The page of decoding.py."""

from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

from decoding_passes import FINAL
from decoding_plot import plot
from decoding_results import (
    agreement,
    decoding_rates,
    first_milliseconds,
    over_passes,
    pass_times,
    perplexity,
    ratio,
    roofline,
    segments_of,
    speculation,
    way_of,
    whole_rates,
)
from decoding_ways import BF16, BF16_LOSSLESS, EXITS, FULL, HUGGING_FACE, INT8, LOSSLESS, NEMO, ROUNDED

from nemo_ee.files.output import write_text, write_with
from nemo_ee.report.schema import Spread
from nemo_ee.report.statistics import spread

MIB, GB = 2**20, 1e9
READ = {FULL: 1.0, HUGGING_FACE: 1.0, NEMO: 1.0, BF16: 0.5, INT8: 0.25}
"""What a step reads of all weights' bytes, once, for ways whose every step reads all weights."""


def write_page(rows: Sequence[dict], directory: Path) -> str:
    """Writes decoding.md and .png; returns the page.

    Args:
        rows: of decoding.json, in the order of the page.
        directory: where to.
    """
    page = _page(rows)
    write_with(directory / "decoding.png", partial(plot(rows).savefig, format="png"))
    write_text(directory / "decoding.md", page)
    return page


def _page(rows: Sequence[dict]) -> str:
    first = rows[0]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    commands = "\n\n".join(dict.fromkeys(f"`{row['command']}`" for row in rows))
    devices = "; ".join(dict.fromkeys(row["device"] for row in rows))
    loads = sorted(float(row["load"]) for row in rows)
    precision = "float32" if first["settings"]["precision"] == "32" else "bf16"
    exits = " and ".join(map(str, first["exits"]))
    cells = "\n\n".join(f"### {row['name'].capitalize()}\n\n{_cell(row)}" for row in rows)
    return f"""# Decoding speed

{commands}

Commit {commits}. {devices}, torch {first["torch"]}; load averages from {loads[0]:.1f} to {loads[-1]:.1f} at
the end of cells. {rows[-1]["date"]}; {sum(row["seconds"] for row in rows) / 60:.0f} minutes in all.
{precision}, greedy, {first["settings"]["new_tokens"]} new tokens per prompt (EOS is kept from coming), exits
at layers {exits} of {first["layers"]}.

All ways run in one process on the same weights and take turns in an order that is drawn anew for each repetition,
each after a short call that is not counted; each repetition has other prompts. Medians (quartiles); ratios
are taken within repetitions. *Tokens/s* counts from the first token on, *whole call* from the call's beginning;
*first token* is when a way's stopping condition is first asked (with Hugging Face's assistant that is after a
round of drafts; its *tokens/s* counts from plain Hugging Face's first token). The *roofline* is a step that only
reads all weights (of bf16 and int8 ways half and a quarter of the bytes), and the cache, at the bandwidth measured
beside the cell. *Agreement* is that with full depth
on full depth's own text: of exits at every token that they could say, of other ways up to the first token of a
text that is not full depth's. *Perplexity* is the full model's, of what was generated. *Memory* is the weights
that a way uses and the most memory beyond that in its first call (on a CPU resident memory, on a GPU what
torch's allocator gave out).

## Targets

{_targets(rows)}

![Speed at batch 1, speed against full depth, time over passes, lossless](decoding.png)

## Cells

NeMo's loop, 8-bit weights and Hugging Face's assistant run at batch 1 only, where prompts are many tokens in
all only one threshold. *Memory* of int8 and bf16 ways includes the making of their
weights.

{cells}

## Early exit: time over passes

Seconds after the first token over the sum of the passes that were run: every segment's (the layers between
exits) for that many sequences and tokens, and every head's that was asked; each at its own measured time, as
below. The rest is embedding, choosing tokens, bookkeeping, and text.

{_passes_table(rows)}

## Lossless: where it wins

A round brings 1 + a j tokens, where the full model looks at j drafts and confirms a share a of them. With the
times of an average round's passes that predicts the speed-up over full depth, and the acceptance from which
on there is one.

{_lossless(rows)}

## Time of each pass

Milliseconds, {first["name"]}, half of the new tokens generated; for several tokens of one sequence at once.

{_pass_times(first)}

## Roofline

Bandwidth in GB/s with as many threads as decoding has, in every repetition the best of several readings, of which
this is the median. The highest counts; a *copy* is how bandwidth is usually stated.

{_roofline(rows)}

{_products(rows)}
"""


def _cell(row: dict) -> str:
    full, other = way_of(row, FULL), way_of(row, HUGGING_FACE)
    lines = []
    for way in row["ways"]:
        rate = spread(list(decoding_rates(row, way).values()))
        lines.append(
            [
                way["name"],
                _spread(rate, 1),
                f"{spread(list(whole_rates(row, way).values())).median:.1f}",
                _spread(first_milliseconds(way), 0),
                _spread(ratio(row, way, other), 2),
                _spread(ratio(row, way, full), 2),
                f"{rate.median / roofline(row, share=READ[way['kind']]):.2f}" if way["kind"] in READ else "",
                f"{agreement(way):.3f}",
                f"{perplexity(way):.2f}",
                "" if way["peak"] is None else f"{(way['parameters'] + way['peak']) / MIB:,.0f}",
            ]
        )
    header = ["way", "tokens/s", "whole call", "first token, ms", "x Hugging Face", "x full depth"]
    header += ["of the roofline", "agreement", "perplexity", "memory, MiB"]
    judged = way_of(row, FULL)["quality"]["tokens"]
    calls = sorted({len(way["calls"]) for way in row["ways"]})
    repeats = " or ".join(dict.fromkeys(map(str, (calls[0], calls[-1]))))
    note = f"Prompts: {row['prompts']}. {repeats} repetitions. Quality on {judged} tokens."
    return f"{_table(header, lines)}\n\n{note} {_ties(row)}{_left_out(row)}"


def _ties(row: dict) -> str:
    left = {
        way["name"]: way["quality"]["gaps"] for way in row["ways"] if way["kind"] not in (EXITS, *ROUNDED)
    }
    left = {name: gaps for name, gaps in left.items() if gaps}
    if not left:
        return "All ways at full depth with the model's own weights generated the same tokens."
    each = "; ".join(
        f"{name} {len(gaps)} (gap at most {max(map(abs, gaps)):.1g})" for name, gaps in left.items()
    )
    return f"Texts that leave full depth's at a near-tie of two logits (within {row['epsilon']:g}): {each}."


def _left_out(row: dict) -> str:
    return "".join(f" Left out: {name}: {reason}." for name, reason in row["left_out"].items())


def _targets(rows: Sequence[dict]) -> str:
    lines = []
    for row, kind in product((row for row in rows if row["batch"] == 1), (FULL, BF16)):
        way = way_of(row, kind)
        faster = ratio(row, way, way_of(row, HUGGING_FACE))
        lines.append([f"{kind} x Hugging Face, {row['name']}", ">= 1.20", *_held(faster, 1.2, True)])
        for bandwidth in (None, "copy") if kind == FULL else ():
            rates = decoding_rates(row, way).values()
            share = spread([rate / roofline(row, bandwidth, READ[kind]) for rate in rates])
            name = f"{kind} of the roofline{f' of a {bandwidth}' if bandwidth else ''}, {row['name']}"
            lines.append([name, ">= 0.75", *_held(share, 0.75, True)])
    for kind, base, target in (
        (EXITS, None, 1.1),
        (LOSSLESS, FULL, 0.95),
        (BF16_LOSSLESS, BF16, 0.95),
    ):
        found = [
            (ratio(row, way, way_of(row, base)) if base else over_passes(row, way), row, way)
            for row in rows
            for way in row["ways"]
            if way["kind"] == kind
        ]
        if found:
            worst, row, way = (min if base else max)(found, key=lambda each: each[0].median)
            what = f"{kind} x {base}" if base else "early exit's time over its passes"
            name = f"{what}, worst: {row['name']}, threshold {way['threshold']:g}"
            sign = ">=" if base else "<="
            lines.append([name, f"{sign} {target:.2f}", *_held(worst, target, bool(base))])
    return _table(["", "target", "measured", "held"], lines)


def _held(value: Spread | None, target: float, at_least: bool) -> list[str]:
    if value is None:
        return ["not measured", ""]
    return [_spread(value, 2), "yes" if (value.median >= target) == at_least else "**no**"]


def _passes_table(rows: Sequence[dict]) -> str:
    lines = []
    for row in rows:
        for way in row["ways"]:
            if (value := over_passes(row, way)) is not None:
                lines.append([row["name"], way["name"], _spread(value, 3), _visits(row, way)])
    return _table(["cell", "way", "time / passes", "passes of a sequence per token"], lines)


def _visits(row: dict, way: dict) -> str:
    """How many passes of a sequence through each segment there were per generated token."""
    count = row["settings"]["new_tokens"]
    tokens = sum(row["batch"] * (count - call["first_tokens"]) for call in way["calls"])
    visits: dict[str, int] = {}
    for call in way["calls"]:
        for part, sequences, _, often in call["passes"]:
            visits[part] = visits.get(part, 0) + sequences * often
    return ", ".join(
        f"{part} {n / tokens:.2f}" for part, n in sorted(visits.items()) if part.startswith("layers")
    )


def _lossless(rows: Sequence[dict]) -> str:
    lines = []
    for row in rows:
        for way in (way for way in row["ways"] if way["kind"] == LOSSLESS):
            found = speculation(row, way)
            measured = _spread(ratio(row, way, way_of(row, FULL)), 2)
            values = ["", "", "", "no drafts"]
            if found is not None:
                values = [f"{found.drafts:.2f}", f"{found.acceptance:.2f}", f"{found.break_even:.2f}"]
                values.append(f"{found.speedup:.2f}")
            lines.append([row["name"], f"{way['threshold']:g}", *values, measured])
    header = [
        "cell",
        "threshold",
        "drafts per round",
        "acceptance",
        "needed",
        "predicted speed-up",
        "measured",
    ]
    return _table(header, lines) if lines else "Not measured."


def _pass_times(row: dict) -> str:
    times = pass_times(row).seconds
    widths = [1, 2, 4, 8, 16]
    parts = [*segments_of(row), *(f"exit {n}" for n in row["exits"]), FINAL]
    lines = []
    for part in parts:
        cells = {each.tokens: s for each, s in times.items() if each.part == part and each.sequences == 1}
        lines.append([part, *(f"{1000 * cells[m]:.2f}" if m in cells else "" for m in widths)])
    return _table(["pass", *(f"{m} tokens" if m > 1 else "1 token" for m in widths)], lines)


def _roofline(rows: Sequence[dict]) -> str:
    kinds = list(rows[0]["bandwidth"])
    lines = [
        [
            row["name"],
            *(f"{row['bandwidth'][kind] / GB:.1f}" for kind in kinds),
            f"{row['weight_bytes'] / MIB:.1f}",
            f"{row['cache_bytes'] / MIB:.2f}",
            f"{roofline(row):.1f}",
        ]
        for row in rows
    ]
    header = ["cell", *kinds, "weights, MiB", "cache of a sequence, MiB", "roofline, tokens/s"]
    return _table(header, lines)


def _products(rows: Sequence[dict]) -> str:
    lines = []
    for row in rows:
        for kind, name in (("native", FULL), ("bf16", BF16), ("int8", INT8)):
            if (seconds := row["products"].get(kind)) is not None:
                token = 1 / spread(list(decoding_rates(row, way_of(row, name)).values())).median
                share = 1 / seconds / roofline(row, share=READ[name])
                lines.append(
                    [row["name"], name, *(f"{1000 * s:.1f}" for s in (seconds, token)), f"{share:.2f}"]
                )
    header = ["cell", "way", "products, ms", "token, ms", "products of the roofline"]
    note = (
        "The matrix-vector products of a token alone, of which the roofline is that of the bytes in question."
    )
    return f"{note}\n\n{_table(header, lines)}"


def _spread(s: Spread | None, digits: int) -> str:
    return "" if s is None else f"{s.median:.{digits}f} ({s.q25:.{digits}f} to {s.q75:.{digits}f})"


def _table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])
