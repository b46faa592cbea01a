# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Confidence against agreement, bin by bin, with intervals over documents."""

import numpy as np

from nemo_ee.calibration.exit_decisions import TokenScores
from nemo_ee.calibration.schema import ExitReliability, ReliabilityBin
from nemo_ee.report.statistics import bootstrap_mean


def measure_reliability(scores: TokenScores, bins: int, seed: int) -> tuple[ExitReliability, ...]:
    """Every exit's, as if every token reached it.

    Args:
        scores: of all documents.
        bins: of equal width.
        seed: of the bootstrap over documents.
    """
    edges = np.linspace(0.0, 1.0, bins + 1)
    return tuple(
        _exit(layer, confidences, ~disagrees, scores.documents, edges, seed)
        for layer, confidences, disagrees in zip(
            scores.layers, scores.confidences, scores.disagrees, strict=True
        )
    )


def _exit(
    layer: int,
    confidences: np.ndarray,
    agrees: np.ndarray,
    documents: np.ndarray,
    edges: np.ndarray,
    seed: int,
) -> ExitReliability:
    # Rounding may put a probability a little above 1.
    place = np.clip(np.searchsorted(edges, confidences, side="left") - 1, 0, len(edges) - 2)
    bins = tuple(
        _bin(low, high, confidences[chosen], agrees[chosen], documents[chosen], seed)
        for low, high, chosen in (
            (float(edges[n]), float(edges[n + 1]), np.flatnonzero(place == n)) for n in range(len(edges) - 1)
        )
    )
    gaps = sum(each.tokens * abs(each.agreement - each.mean_confidence) for each in bins if each.tokens)
    return ExitReliability(
        layer=layer,
        agreement=float(agrees.mean()),
        mean_confidence=float(confidences.mean()),
        ece=gaps / len(agrees),
        bins=bins,
    )


def _bin(
    low: float, high: float, confidences: np.ndarray, agrees: np.ndarray, documents: np.ndarray, seed: int
) -> ReliabilityBin:
    if not len(agrees):
        return ReliabilityBin(low, high, 0, None, None, None)
    totals, counts = np.bincount(documents, weights=agrees), np.bincount(documents)
    agreement, interval = bootstrap_mean(totals, counts, seed=seed)
    return ReliabilityBin(low, high, len(agrees), float(confidences.mean()), agreement, interval)
