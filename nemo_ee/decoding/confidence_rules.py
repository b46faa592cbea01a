# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""How sure an exit is, by several rules; each gives a confidence within [0, 1] per token.

Rules beyond the maximum probability: entropy (BranchyNet, arXiv:1709.01686), the margin between the two best
tokens and the similarity of hidden states (CALM, arXiv:2207.07061, section 3.5), patience (PABEE,
arXiv:2006.04152). Suffixes: N tokens, H hidden size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_ee.decoding.prediction import Prediction
from nemo_ee.modeling.vocab_parallel import gather_columns, log_sum_over_ranks, reduce_over_ranks

PATIENCE = 2
"""Exits in a row that must name the same token for a patience of 1."""


@dataclass(frozen=True)
class ExitEvidence:
    """What a rule may look at; the same on all tensor-parallel ranks but for the prediction's logits.

    Attributes:
        prediction: the exit's, of N tokens.
        hidden: [N, H] the hidden states that the exit reads.
        previous_hidden: [N, H] those of the exit before it that the token was asked at; zeros where this is
            its first. None for rules that do not look back.
        agreeing: [N] how many exits in a row, this one the last, named this one's token. None likewise.
    """

    prediction: Prediction
    hidden: Tensor
    previous_hidden: Tensor | None = None
    agreeing: Tensor | None = None


@dataclass(frozen=True)
class ConfidenceRule:
    """A rule.

    Attributes:
        confidence: gives [N] from evidence, each within [0, 1].
        looks_back: whether it reads `previous_hidden` or `agreeing`, which cost a little to keep.
    """

    confidence: Callable[[ExitEvidence], Tensor]
    looks_back: bool = False

    def sureness(self, evidence: ExitEvidence) -> Tensor:
        """[N] confidences; NaN, which is above no threshold, where the prediction is: some rules do not look at it."""
        sure, prediction = self.confidence(evidence), evidence.prediction
        return sure if sure is prediction.confidence else sure + 0 * prediction.confidence


CONFIDENCE_RULES: dict[str, ConfidenceRule] = {}
"""By name; add your own with `register_confidence_rule`."""


def register_confidence_rule(
    name: str, looks_back: bool = False
) -> Callable[[Callable[[ExitEvidence], Tensor]], Callable[[ExitEvidence], Tensor]]:
    """Decorates a function from evidence to [N] confidences, and makes it known under that name.

    Raises:
        ValueError: the name is taken.
    """

    def register(confidence: Callable[[ExitEvidence], Tensor]) -> Callable[[ExitEvidence], Tensor]:
        if name in CONFIDENCE_RULES:
            raise ValueError(f"confidence rule {name!r} exists already; choose another name")
        CONFIDENCE_RULES[name] = ConfidenceRule(confidence, looks_back)
        return confidence

    return register


@register_confidence_rule("max_probability")
def max_probability(evidence: ExitEvidence) -> Tensor:
    """Probability of the most probable token."""
    return evidence.prediction.confidence


@register_confidence_rule("entropy")
def entropy(evidence: ExitEvidence) -> Tensor:
    """1 - entropy / log(outcomes); a shortlist's bucket is one outcome.

    Collectives: four all-reduces of [N] where TP > 1.
    """
    logits, log_normaliser = _wide_logits(evidence.prediction)
    possible = logits > float("-inf")
    log_probabilities = torch.where(possible, logits - log_normaliser[:, None], 0.0)
    terms = torch.where(possible, log_probabilities.exp() * log_probabilities, 0.0)
    outcomes = reduce_over_ranks(possible.sum(-1).to(logits.dtype)).clamp_min(2)
    return (1 + reduce_over_ranks(terms.sum(-1)) / outcomes.log()).clamp(0, 1)


@register_confidence_rule("margin")
def margin(evidence: ExitEvidence) -> Tensor:
    """Probability of the most probable token less that of the best other outcome, 0 if that is higher.

    Collectives: two all-reduces of [N] and an all-gather of [N, 2] where TP > 1.
    """
    logits, log_normaliser = _wide_logits(evidence.prediction)
    padded = torch.nn.functional.pad(logits, (0, max(0, 2 - logits.shape[1])), value=-math.inf)
    highest = gather_columns(padded.topk(2).values).topk(2).values
    first, second = (highest - log_normaliser[:, None]).exp().unbind(-1)
    best = evidence.prediction.confidence  # up to rounding one of the two
    others = torch.where((first - best).abs() <= (second - best).abs(), second, first)
    return (best - others).clamp(0, 1)


@register_confidence_rule("similarity", looks_back=True)
def similarity(evidence: ExitEvidence) -> Tensor:
    """(1 + cosine of the hidden states of this exit and the one before) / 2; 0 at a token's first exit."""
    wide = torch.promote_types(evidence.hidden.dtype, torch.float32)
    now, before = evidence.hidden.to(wide), evidence.previous_hidden.to(wide)
    cosine = torch.nn.functional.cosine_similarity(now, before, dim=-1)
    return torch.where(before.any(-1), (1 + cosine) / 2, 0.0).clamp(0, 1)


@register_confidence_rule("patience", looks_back=True)
def patience(evidence: ExitEvidence) -> Tensor:
    """Exits in a row that named this token over `PATIENCE`, at most 1."""
    wide = evidence.prediction.confidence.dtype
    return (evidence.agreeing.to(wide) / PATIENCE).clamp_max(1)


def _wide_logits(prediction: Prediction) -> tuple[Tensor, Tensor]:
    """Logits [N, R] of this rank in float32 or wider, and the log of their normaliser over all ranks [N]."""
    logits = prediction.logits.to(torch.promote_types(prediction.logits.dtype, torch.float32))
    return logits, log_sum_over_ranks(logits.logsumexp(-1))
