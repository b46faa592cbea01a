# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What follows from the rows of decoding.json: rates, ratios, predictions, and what lossless decoding needs."""

import math
from dataclasses import dataclass

from decoding_passes import FINAL, Pass, PassTimes
from decoding_ways import ASSISTED, HUGGING_FACE

from nemo_ee.report.schema import Spread
from nemo_ee.report.statistics import spread


def way_of(row: dict, name: str) -> dict | None:
    """A way of a cell, or None if the cell has not got it."""
    return next((way for way in row["ways"] if way["name"] == name), None)


def decoding_rates(row: dict, way: dict) -> dict[int, float]:
    """Tokens per second of the whole batch after the first ones, per repetition.

    A first round of Hugging Face's assistant brings many tokens at once, perhaps all; there the time without
    assistant to the first one is taken off the whole, and all others count.
    """
    count, batch, rates = row["settings"]["new_tokens"], row["batch"], {}
    plain = way_of(row, HUGGING_FACE) if way["kind"] == ASSISTED else None
    first = {call["repeat"]: call for call in (plain or way)["calls"]}
    for call in way["calls"]:
        if (begun := first.get(call["repeat"])) is not None:
            seconds = call["seconds"] - begun["first"]
            rates[call["repeat"]] = batch * (count - begun["first_tokens"]) / seconds
    return rates


def whole_rates(row: dict, way: dict) -> dict[int, float]:
    """Tokens per second of whole calls, prompts included, per repetition."""
    count = row["settings"]["new_tokens"]
    return {call["repeat"]: row["batch"] * count / call["seconds"] for call in way["calls"]}


def first_milliseconds(way: dict) -> Spread:
    """To the first token."""
    return spread([1000 * call["first"] for call in way["calls"]])


def ratio(row: dict, way: dict, other: dict | None) -> Spread | None:
    """One way's decoding rate over another's, within repetitions that have both."""
    if other is None:
        return None
    one, base = decoding_rates(row, way), decoding_rates(row, other)
    return spread([one[repeat] / base[repeat] for repeat in one if repeat in base])


def roofline(row: dict, kind: str | None = None, share: float = 1.0) -> float:
    """Tokens per second at full depth if each step only read all weights once, and every sequence's cache.

    Args:
        row: of the results.
        kind: of bandwidth; None for the highest.
        share: of the weights' bytes that are read.
    """
    bandwidth = row["bandwidth"][kind] if kind else max(row["bandwidth"].values())
    return row["batch"] * bandwidth / (share * row["weight_bytes"] + row["batch"] * row["cache_bytes"])


def pass_times(row: dict) -> PassTimes:
    """Of a cell."""
    return PassTimes({Pass(*each): seconds for *each, seconds in row["pass_times"]})


def segments_of(row: dict) -> dict[str, range]:
    """Names of the segments between all exits, and their layers."""
    edges = [0, *row["exits"], row["layers"]]
    spans = [range(low + 1, high + 1) for low, high in zip(edges[:-1], edges[1:], strict=True)]
    return {f"layers {span[0]}-{span[-1]}": span for span in spans}


def passes_of(row: dict, call: dict) -> dict[Pass, int]:
    """What a call ran after its first tokens. Without exits in use the layers are one segment, which is taken
    apart where exits stand."""
    passes: dict[Pass, int] = {}
    for part, sequences, tokens, often in call["passes"]:
        parts = [part]
        if part.startswith("layers"):
            first, last = map(int, part.removeprefix("layers ").split("-"))
            parts = [name for name, span in segments_of(row).items() if first <= span[0] and span[-1] <= last]
        for name in parts:
            passes[Pass(name, sequences, tokens)] = often
    return passes


def over_passes(row: dict, way: dict) -> Spread | None:
    """Measured seconds after the first tokens over the sum of the passes that were run."""
    times = pass_times(row)
    found = [
        (call["seconds"] - call["first"]) / times.total(passes_of(row, call))
        for call in way["calls"]
        if call["passes"]
    ]
    return spread(found) if found else None


def perplexity(way: dict) -> float:
    """The full model's, of what was generated."""
    quality = way["quality"]
    return math.exp(quality["loss"] / quality["tokens"])


def agreement(way: dict) -> float:
    """With full depth, see `decoding_quality`."""
    return way["quality"]["agreed"] / way["quality"]["compared"]


@dataclass(frozen=True)
class Speculation:
    """Lossless decoding in averages.

    A round ends when the full model looks at j drafts of a sequence and predicts once more; it brings
    1 + a j tokens. A token at full depth, while drafting pauses, is a round without drafts.

    Attributes:
        drafts: j, per round.
        acceptance: a, share of drafts that the full model confirms.
        round_seconds: of an average round's passes, each at its own measured time.
        full_seconds: full depth's passes per token.
    """

    drafts: float
    acceptance: float
    round_seconds: float
    full_seconds: float

    @property
    def speedup(self) -> float:
        """Over full depth, predicted."""
        return (1 + self.acceptance * self.drafts) * self.full_seconds / self.round_seconds

    @property
    def break_even(self) -> float:
        """Acceptance from which on it is faster than full depth, with drafts as they are; over 1: never."""
        return (self.round_seconds / self.full_seconds - 1) / self.drafts


def speculation(row: dict, way: dict) -> Speculation | None:
    """Averages over a lossless way's calls; None where nothing was drafted."""
    calls, last = [passes_of(row, call) for call in way["calls"]], list(segments_of(row))[-1]
    rounds = sum(
        each.sequences * often for call in calls for each, often in call.items() if each.part == last
    )
    drafts, accepted = (sum(call[key] for call in way["calls"]) for key in ("drafts", "accepted"))
    if not drafts:
        return None
    times = pass_times(row)
    return Speculation(
        drafts=drafts / rounds,
        acceptance=accepted / drafts,
        round_seconds=sum(times.total(call) for call in calls) / rounds,
        full_seconds=_full_step(row, times) / row["batch"],
    )


def _full_step(row: dict, times: PassTimes) -> float:
    """Seconds of a step of the whole batch at full depth."""
    return sum(times(part, row["batch"], row["batch"]) for part in (*segments_of(row), FINAL))
