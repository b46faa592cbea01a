# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The tokens that top-k and top-p leave to draw from, without sorting the vocabulary.

A row of logits costs a few passes over it: the maximum, the weights exp(logit - maximum), their sum, and a comparison
that finds the tokens above a floor; these alone are sorted. NumPy computes: its calls cost a fifth of torch's.
"""

from dataclasses import dataclass

import numpy as np

FEW = 1024
"""The first floor is the rest's probability (1 - top_p) over this, the next one over eight times as much: most texts'
nuclei lie above the first, flatter ones above the second."""

BLOCK = 256
"""Weights that are summed together first: a token is looked for among the sums, then within one block."""


@dataclass(frozen=True)
class Nucleus:
    """What one token is drawn from.

    Attributes:
        tokens: [m] ascending; None for all of the vocabulary.
        weights: [m] proportional to their probabilities; NaN where the logits have no finite maximum.
    """

    tokens: np.ndarray | None
    weights: np.ndarray

    @classmethod
    def of(cls, row: np.ndarray, top_k: int, top_p: float) -> "Nucleus":
        """Of logits [V], in float32 or wider, divided by the temperature; see `keep_most_probable`."""
        highest = row.max()
        if not np.isfinite(highest):
            return cls(None, np.full_like(row, np.nan))
        weights = np.exp(row - highest)
        tokens: np.ndarray | None = None
        if 0 < top_k < len(row):
            tokens = _highest(row, top_k)
            weights = weights[tokens]
        if 0.0 < top_p < 1.0:
            chosen = _most_probable(row if tokens is None else row[tokens], weights, top_p)
            tokens, weights = chosen if tokens is None else tokens[chosen], weights[chosen]
        return cls(tokens, weights)

    def draw(self, uniform: float) -> int:
        """The token at a number within [0, 1), by inversion in the vocabulary's order."""
        weights = self.weights.astype(np.float64)
        sums = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK))
        ends = np.cumsum(sums)
        target = uniform * ends[-1]
        block = min(int(np.searchsorted(ends, target, side="right")), len(ends) - 1)
        before = ends[block - 1] if block else 0.0
        inside = before + np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK])
        place = block * BLOCK + min(int(np.searchsorted(inside, target, side="right")), len(inside) - 1)
        return place if self.tokens is None else int(self.tokens[place])

    def write(self, probabilities: np.ndarray) -> None:
        """Into [V] zeros: the probability of each token."""
        shares = self.weights / self.weights.sum(dtype=np.float64)
        probabilities[slice(None) if self.tokens is None else self.tokens] = shares


def _highest(row: np.ndarray, count: int) -> np.ndarray:
    """The tokens of the `count` highest logits and of what equals the lowest of these, ascending."""
    columns = len(row) // BLOCK
    above = None
    if count <= columns:  # so many maxima of different logits: the count-th highest logit is not below theirs
        maxima = row[: columns * BLOCK].reshape(BLOCK, columns).max(0)
        above = np.flatnonzero(row >= np.partition(maxima, columns - count)[columns - count])
        row = row[above]
    chosen = np.flatnonzero(row >= np.partition(row, len(row) - count)[len(row) - count])
    return chosen if above is None else above[chosen]


def _most_probable(row: np.ndarray, weights: np.ndarray, top_p: float) -> np.ndarray:
    """The fewest tokens that have more than `top_p` of the probability together, ascending; the first of equal ones.

    What lies below a floor of total (1 - top_p) / n has at most 1 - top_p of it, if there are n tokens: so the nucleus
    is found above that floor at the latest, and mostly above a higher one.
    """
    total = weights.sum(dtype=np.float64)
    rest = total * (1.0 - top_p)
    for floor in (rest / FEW, rest / (8 * FEW), rest / len(row), 0.0):
        above = np.flatnonzero(weights > floor)
        if weights[above].sum(dtype=np.float64) < top_p * total:
            continue
        ordered = above[np.argsort(-row[above], kind="stable")]
        shares = (weights[ordered] / total).astype(weights.dtype)
        # As torch sums float32 on a CPU: in float64, every partial sum rounded.
        enough = np.cumsum(shares, dtype=np.float64).astype(weights.dtype) > weights.dtype.type(top_p)
        if enough.any():
            return np.sort(ordered[: int(enough.argmax()) + 1])
    return np.flatnonzero(weights >= 0.0)  # by rounding all together have no more
