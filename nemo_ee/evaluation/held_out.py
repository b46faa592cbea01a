# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Quality of exits on held-out text: means over tokens, with intervals over sequences."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nemo_ee.data.checks import check_indexed_dataset
from nemo_ee.evaluation.teacher_forced import ExitScores, TextScores
from nemo_ee.report.schema import ExitQuality, Interval
from nemo_ee.report.statistics import bootstrap_mean


def held_out_sequences(prefix: str, sequences: int, length: int, vocab_size: int) -> Tensor:
    """Evenly spaced, disjoint pieces of an indexed dataset, [N, length + 1]; the last token is only a label.

    Args:
        prefix: path without `.bin` and `.idx`.
        sequences: N at most; fewer if the text is shorter.
        length: tokens to predict per sequence.
        vocab_size: of the model.

    Raises:
        DataError: the dataset is missing or damaged, shorter than one sequence, or of another vocabulary.
    """
    keys = dict(key="data.prefix", length_key="data.seq_length")
    ids = check_indexed_dataset(prefix, length, vocab_size, "held-out text", **keys).token_ids()
    fit = (len(ids) - 1) // length
    count = min(sequences, fit)
    starts = [fit * index // count * length for index in range(count)]
    return torch.from_numpy(np.stack([ids[start : start + length + 1] for start in starts]).astype(np.int64))


@dataclass
class ExitTotals:
    """Sums per sequence of one exit."""

    losses: list[float] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)
    strict_agreements: list[float] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)

    def add(self, scores: ExitScores, final: ExitScores, counted: Tensor) -> None:
        """Adds a batch of sequences, of which those positions count that are True in `counted` [B, S]."""
        equal = (scores.tokens == final.tokens) & counted
        self.losses += (scores.losses.double() * counted).sum(1).tolist()
        self.agreements += equal.double().sum(1).tolist()
        self.strict_agreements += (equal & ~scores.bucket_wins).double().sum(1).tolist()
        self.confidences += (scores.confidences.double() * counted).sum(1).tolist()


@dataclass(frozen=True)
class HeldOutQuality:
    """All exits on the same text; see `ExitQuality`."""

    exits: tuple[ExitQuality, ...]
    final_loss: float
    final_loss_ci: Interval | None


def measure_quality(
    score: Callable[[Tensor, Tensor], TextScores], sequences: Iterable[Tensor], seed: int
) -> HeldOutQuality:
    """Loss, agreement and confidence of every exit.

    Args:
        score: tokens and labels [B, S] -> scores, e.g. `score_text` of a model.
        sequences: batches of token ids [B, S + 1].
        seed: of the bootstrap over sequences.
    """
    scored = (score(batch[:, :-1], batch[:, 1:]) for batch in sequences)
    return quality_of(((each, torch.ones_like(each.final.tokens, dtype=torch.bool)) for each in scored), seed)


def quality_of(scored: Iterable[tuple[TextScores, Tensor]], seed: int) -> HeldOutQuality:
    """`measure_quality` of scores that are there.

    Args:
        scored: batches of scores and which of their positions count, [B, S].
        seed: of the bootstrap over sequences.
    """
    exits: dict[int, ExitTotals] = {}
    final, counts = ExitTotals(), []
    for scores, counted in scored:
        final.add(scores.final, scores.final, counted)
        counts += counted.double().sum(1).tolist()
        for n, each in scores.exits.items():
            exits.setdefault(n, ExitTotals()).add(each, scores.final, counted)
    loss, loss_ci = bootstrap_mean(final.losses, counts, seed=seed)
    return HeldOutQuality(tuple(_quality(n, exits[n], counts, seed) for n in sorted(exits)), loss, loss_ci)


def _quality(layer: int, totals: ExitTotals, counts: list[float], seed: int) -> ExitQuality:
    loss, loss_ci = bootstrap_mean(totals.losses, counts, seed=seed)
    agreement, agreement_ci = bootstrap_mean(totals.agreements, counts, seed=seed)
    tokens = sum(counts)
    return ExitQuality(
        layer=layer,
        loss=loss,
        agreement=agreement,
        mean_confidence=sum(totals.confidences) / tokens,
        tokens=int(tokens),
        loss_ci=loss_ci,
        agreement_ci=agreement_ci,
        strict_agreement=sum(totals.strict_agreements) / tokens,
    )
