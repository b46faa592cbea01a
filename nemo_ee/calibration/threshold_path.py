# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A path of threshold vectors from strict to lenient, drawn on tuning text.

Every step lowers the threshold of one exit by one level: of that exit which saves the most layers per
additional disagreement with the final exit. Tokens that an earlier exit has let go already neither save nor
cost anything at a later one, so exits are judged by what is left for them.
"""

import numpy as np

from nemo_ee.calibration.exit_decisions import TokenScores
from nemo_ee.decoding.leaving import NEVER

RESOLUTION = 10_000
"""Thresholds are whole multiples of 1 / RESOLUTION: short to write, and exact when read back."""


def threshold_path(scores: TokenScores, levels: int) -> list[tuple[float, ...]]:
    """Threshold vectors, one number per exit, each vector lower than the one before in one number.

    Args:
        scores: of tuning text. What the path is used to test must be other text.
        levels: per exit, at most; each lets about the same share of its tokens be sure.

    Returns:
        Ends where no lower threshold would save a layer. Empty if none does from the start.
    """
    ladders = [threshold_levels(row, levels) for row in scores.confidences]
    rungs = np.stack(
        [_first_rung(row, ladder) for row, ladder in zip(scores.confidences, ladders, strict=True)]
    )
    wrong = np.vstack([scores.disagrees, np.zeros(len(scores.documents), dtype=bool)]).astype(np.int64)
    tokens, depths = np.arange(len(scores.documents)), scores.depths
    at = np.full(len(tokens), len(ladders))
    thresholds, lowered = [NEVER] * len(ladders), [0] * len(ladders)
    path: list[tuple[float, ...]] = []
    while True:
        rates = []
        for n, ladder in enumerate(ladders):
            later = at > n
            saved = np.where(later, depths[at] - depths[n], 0)
            added = np.where(later, wrong[n] - wrong[at, tokens], 0)
            rates.append(_best_rate(rungs[n], saved, added, lowered[n], len(ladder)))
        best = int(np.argmax(rates))
        if rates[best] <= 0:
            return path
        at[(rungs[best] == lowered[best]) & (at > best)] = best
        thresholds[best] = ladders[best][lowered[best]]
        lowered[best] += 1
        path.append(tuple(thresholds))


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


def _first_rung(confidences: np.ndarray, ladder: list[float]) -> np.ndarray:
    """[T] the first of the descending thresholds that lets each token go (`leaves`); their number if none does."""
    return len(ladder) - np.searchsorted(np.array(ladder[::-1]), confidences, side="left")


def _best_rate(rungs: np.ndarray, saved: np.ndarray, added: np.ndarray, first: int, count: int) -> float:
    """Layers saved per additional disagreement over the next rungs, as many as look best; 0 at the end.

    One disagreement more is counted than the tuning text shows: a few tokens without one prove little.
    """
    if first == count:
        return 0.0
    layers = np.bincount(rungs, weights=saved, minlength=count)[first:count].cumsum()
    disagreements = np.bincount(rungs, weights=added, minlength=count)[first:count].cumsum()
    return float((layers / (1.0 + np.maximum(disagreements, 0.0))).max())
