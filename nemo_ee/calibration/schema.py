# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What a calibration found, as frozen records that go to ``calibration.json``.

Agreement is a share of tokens, confidence lies within [0, 1], depth is counted in layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from nemo_ee.report.schema import Interval, Metadata

VERSION = 2
"""Of the JSON layout; raised when a field changes its meaning or goes away."""


@dataclass(frozen=True)
class ReliabilityBin:
    """Tokens whose confidence lies in one interval, open below and closed above (the lowest one has 0 too).

    Attributes:
        low: of the interval.
        high: of the interval.
        tokens: how many there are.
        mean_confidence: None without tokens.
        agreement: share that equals the final exit's token; None without tokens.
        agreement_ci: its 95 % interval over documents; None if fewer than two have such tokens.
    """

    low: float
    high: float
    tokens: int
    mean_confidence: float | None
    agreement: float | None
    agreement_ci: Interval | None


@dataclass(frozen=True)
class ExitReliability:
    """One exit's confidence against its agreement, over all tokens of all documents.

    Attributes:
        layer: 1-based exit layer.
        agreement: share of all tokens.
        mean_confidence: of all tokens.
        ece: expected calibration error: mean over tokens of |agreement - mean confidence| of the token's bin.
        bins: of equal width from 0 to 1.
    """

    layer: int
    agreement: float
    mean_confidence: float
    ece: float
    bins: tuple[ReliabilityBin, ...]


@dataclass(frozen=True)
class PathRecord:
    """One point of the path, as the test documents show it; of a point estimate, all documents.

    Attributes:
        thresholds: one per exit in use; 1.0 leaves the exit out.
        p_value: of the hypothesis that the agreement at worst is lower than the target; None of a point estimate.
        agreement: measured, every exit being asked.
        agreement_at_worst: measured: no lower, whichever exits are asked at each token.
        agreement_bound: the agreement at worst lies above it with a probability of 1 - delta, for this point taken
            alone; None of a point estimate.
        share_per_exit: exit layer to its share of tokens; the final exit is the last layer.
        mean_layers: layers that run before a token is emitted, mean over tokens.
        speedup: over full depth, expected by the prices of passes.
    """

    thresholds: tuple[float, ...]
    p_value: float | None
    agreement: float
    agreement_at_worst: float
    agreement_bound: float | None
    share_per_exit: Mapping[int, float]
    mean_layers: float
    speedup: float


@dataclass(frozen=True)
class TextSplit:
    """The documents of one part of the text."""

    documents: int
    tokens: int


@dataclass(frozen=True)
class PricesRecord:
    """What a token costs, in seconds.

    Attributes:
        source: of the prices.
        full_depth: of a token without exits.
        output: of the output layer.
        heads: exit layer to what asking it for a token costs.
        layers: tokens of a pass to what all layers cost.
    """

    source: str
    full_depth: float
    output: float
    heads: Mapping[int, float]
    layers: Mapping[int, float]


@dataclass(frozen=True)
class CalibrationReport:
    """A calibration.

    Attributes:
        metadata: where the numbers come from.
        guaranteed: whether anything is promised; else it is a point estimate, or nothing was found.
        promise: what is promised, on which assumptions, in words.
        target_agreement: asked for.
        delta: probability with which the choice of test documents may lead to less; None of a point estimate.
        confidence_rule: how confidence was computed.
        layers: exits in use, ascending.
        thresholds: stored ones, one per exit in use.
        kept: how many points of the path, from the first on, keep the target: certified, or as measured.
        number: of the fastest of them, from 1, whose thresholds are stored; 0 if there is none, and nothing leaves.
        agreement_ci: 95 % interval of the chosen point's agreement over test documents; None if there is none.
        text: in words.
        seq_length: predicted tokens per document at most.
        tuning: text that drew the path.
        test: text that tested it; of a point estimate, all.
        prices: by which thresholds were compared.
        path: from strict to lenient.
        reliability: of each exit in use.
        version: of the layout.
    """

    metadata: Metadata
    guaranteed: bool
    promise: str
    target_agreement: float
    delta: float | None
    confidence_rule: str
    layers: tuple[int, ...]
    thresholds: tuple[float, ...]
    kept: int
    number: int
    agreement_ci: Interval | None
    text: str
    seq_length: int
    tuning: TextSplit
    test: TextSplit
    prices: PricesRecord
    path: tuple[PathRecord, ...]
    reliability: tuple[ExitReliability, ...]
    version: int = VERSION

    @property
    def chosen(self) -> PathRecord | None:
        """The point whose thresholds are stored; None if nothing is."""
        return self.path[self.number - 1] if self.number else None
