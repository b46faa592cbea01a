# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""All vectors of thresholds from a grid, with how many tokens they get wrong and about what a token costs.

A token leaves exit n at a level v_n, counted from 0 (never asked) to the most lenient, if v_n is at least its rung
q_n. So how many tokens go on behind the first n exits, for all vectors at once, is a histogram over rungs, summed up
from above along every axis. The cost is additive in such numbers if a pass takes a time that grows linearly with its
tokens, which is near enough for choosing; what is chosen is then priced as it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from nemo_ee.calibration.exit_decisions import TokenScores
from nemo_ee.calibration.vector_price import pass_seconds
from nemo_ee.decoding.leaving import NEVER
from nemo_ee.decoding.pass_prices import PassPrices

RESOLUTION = 10_000
"""Thresholds are whole multiples of 1 / RESOLUTION: short to write, and exact when read back."""
VECTORS, WIDE = 1_000_000, 4
"""Vectors of a grid, at most; and tokens of a pass from which its time's growth is read."""


@dataclass(frozen=True)
class ThresholdGrid:
    """Vectors of thresholds, [V_1, …, V_E] of them.

    Attributes:
        ladders: thresholds of each exit in use, descending from `NEVER`.
        disagreements: of tokens, every exit being asked.
        at_worst: likewise, whichever exits are asked; see `ExitOutcome`.
        seconds: of a token, about.
    """

    ladders: tuple[tuple[float, ...], ...]
    disagreements: np.ndarray
    at_worst: np.ndarray
    seconds: np.ndarray

    def fastest(self, at_worst: bool, limits: Sequence[float]) -> list[list[tuple[float, ...]]]:
        """For each limit, of every set of exits that are asked, the fastest vector that keeps it.

        Args:
            at_worst: what is limited: `at_worst`, else `disagreements`.
            limits: tokens.
        """
        bad = (self.at_worst if at_worst else self.disagreements).ravel()
        asked = np.zeros(self.seconds.shape, dtype=int)
        for n, size in enumerate(asked.shape):
            asked += (2**n * (np.arange(size) > 0)).reshape(-1, *(1,) * (asked.ndim - n - 1))
        order = np.lexsort((bad, self.seconds.ravel()))
        ranked = [order[asked.ravel()[order] == each] for each in np.unique(asked)]
        found = []
        for limit in limits:
            first = [places[np.argmax(bad[places] <= limit)] for places in ranked]
            kept = [np.unravel_index(place, asked.shape) for place in first if bad[place] <= limit]
            found.append(
                [tuple(row[at] for row, at in zip(self.ladders, each, strict=True)) for each in kept]
            )
        return found


def threshold_grid(
    scores: TokenScores, levels: int, prices: PassPrices, exits: Sequence[int] | None = None
) -> ThresholdGrid:
    """The grid over all exits, or over some.

    Args:
        scores: of tuning text.
        levels: per exit at most, besides `NEVER`; fewer where there would be more than `VECTORS`.
        prices: of passes.
        exits: positions of those that may be asked, ascending; None for all.
    """
    some = list(range(len(scores.layers)) if exits is None else exits)
    count = min(levels, max(1, int(VECTORS ** (1 / max(1, len(some))) + 1e-9) - 1))
    ladders = [
        (NEVER, *(threshold_levels(row, count) if n in some else ()))
        for n, row in enumerate(scores.confidences)
    ]
    rungs = [_rungs(row, ladder) for row, ladder in zip(scores.confidences, ladders, strict=True)]
    shape = tuple(len(ladder) for ladder in ladders)
    wrong, every = np.zeros(shape), np.ones(len(scores.documents))
    for n, row in enumerate(scores.disagrees):
        wrong += _going(rungs[:n], shape, row) - _going(rungs[: n + 1], shape, row)
    risky = [np.where(row, q, size) for row, q, size in zip(scores.disagrees, rungs, shape, strict=True)]
    worst = len(every) - _going(risky, shape, every)
    return ThresholdGrid(tuple(ladders), wrong, worst, _seconds(scores, rungs, shape, prices))


def threshold_levels(confidences: np.ndarray, count: int) -> list[float]:
    """Descending thresholds below 1 that split confidences [T] into `count` parts of about equal size.

    Each is the largest multiple of 1 / `RESOLUTION` below a confidence, so that this one is above it. Equal
    ones are named once; the last is 0.
    """
    descending = np.sort(confidences)[::-1]
    last = np.ceil(len(descending) * np.arange(1, count + 1) / count).astype(int) - 1
    multiples = np.ceil(descending[last] * RESOLUTION).astype(int) - 1
    return [
        m / RESOLUTION for m in sorted({*np.clip(multiples, 0, RESOLUTION - 1).tolist(), 0}, reverse=True)
    ]


def _rungs(confidences: np.ndarray, ladder: Sequence[float]) -> np.ndarray:
    """[T] the first level that lets each token go (`leaves`), from 1; the number of levels if none does."""
    return len(ladder) - np.searchsorted(np.array(ladder[:0:-1]), confidences, side="left")


def _going(rungs: Sequence[np.ndarray], shape: tuple[int, ...], counted: np.ndarray) -> np.ndarray:
    """How many tokens leave at none of the first n exits, for every vector: [V_1, …, V_n, 1, …, 1].

    Args:
        rungs: of these exits, [T] each.
        shape: of the grid.
        counted: [T] which tokens count.
    """
    sides = tuple(size + 1 for size in shape[: len(rungs)])
    cells = np.ravel_multi_index(tuple(rungs), sides) if rungs else np.zeros(len(counted), dtype=int)
    counts = np.bincount(cells, weights=counted, minlength=math.prod(sides)).reshape(sides)
    for axis in range(len(sides)):
        counts = np.flip(np.flip(counts, axis).cumsum(axis), axis)
    behind = counts[(slice(1, None),) * len(sides)]
    return behind.reshape(*behind.shape, *(1,) * (len(shape) - len(sides)))


def _seconds(
    scores: TokenScores, rungs: Sequence[np.ndarray], shape: tuple[int, ...], prices: PassPrices
) -> np.ndarray:
    """Of a token, with passes that grow linearly: a pass of w tokens costs one of a token and w - 1 times a slope, and
    every token is sooner or later in one."""
    every, edges = np.ones(len(scores.documents)), [0, *scores.depths.tolist()]
    reach = [pass_seconds(prices, 0, edge, 1) for edge in edges]
    total = np.zeros(shape)
    for n, (low, high) in enumerate(pairwise(edges)):
        one, going = pass_seconds(prices, low, high, 1), _going(rungs[:n], shape, every)
        slope = max(0.0, pass_seconds(prices, low, high, WIDE) - one) / (WIDE - 1)
        total += (reach[n + 1] - reach[n] - slope) * going + slope * len(every)
        if n < len(scores.layers):
            asked = (np.arange(shape[n]) > 0).reshape(-1, *(1,) * (len(shape) - n - 1))
            split = reach[n + 1] + pass_seconds(prices, high, edges[n + 2], 1) - reach[n + 2]
            total += asked * (prices.head(high, 1) * going + split * _going(rungs[: n + 1], shape, every))
    return (total + prices.output(1) * _going(rungs, shape, every)) / len(every)
