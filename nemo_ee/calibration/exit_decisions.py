# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""At which exit each token of given text leaves, and what that costs and saves, document by document.

Any confidence rule fits: all that counts is one number per exit and token. Suffixes: E exits in use,
ascending by layer; T tokens of all documents; D documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemo_ee.decoding.leaving import leaves


@dataclass(frozen=True)
class TokenScores:
    """What the exits in use say about every token, teacher-forced.

    Attributes:
        layers: exit layers, ascending; E of them.
        num_layers: of the model, which a token runs that leaves at no exit.
        confidences: [E, T], each within [0, 1].
        disagrees: [E, T], whether the exit's token differs from the final exit's.
        documents: [T], the token's document, numbered from 0; every document has a token.
    """

    layers: tuple[int, ...]
    num_layers: int
    confidences: np.ndarray
    disagrees: np.ndarray
    documents: np.ndarray

    def __post_init__(self):
        shape = (len(self.layers), len(self.documents))
        assert self.confidences.shape == self.disagrees.shape == shape, (
            "one row per exit, one column per token"
        )
        assert (self.sizes > 0).all(), "every document has a token"

    @property
    def depths(self) -> np.ndarray:
        """[E + 1] layers that a token runs which leaves at each exit, the final exit last."""
        return np.array([*self.layers, self.num_layers])

    @property
    def sizes(self) -> np.ndarray:
        """[D] tokens per document."""
        return np.bincount(self.documents)

    def of_documents(self, chosen: Sequence[int] | np.ndarray) -> "TokenScores":
        """Those documents alone, each once, numbered anew in the order of `chosen`."""
        number = np.full(len(self.sizes), -1)
        number[np.asarray(chosen)] = np.arange(len(chosen))
        numbers = number[self.documents]
        kept = np.flatnonzero(numbers >= 0)
        return TokenScores(
            self.layers,
            self.num_layers,
            self.confidences[:, kept],
            self.disagrees[:, kept],
            numbers[kept],
        )

    def leave_with(self, thresholds: Sequence[float]) -> "ExitOutcome":
        """What these thresholds, one per exit, do with every token."""
        exits = first_exits(self.confidences, thresholds)
        left = exits < len(self.layers)
        wrong = np.zeros(len(exits), dtype=bool)
        wrong[left] = self.disagrees[exits[left], np.flatnonzero(left)]
        risky = (would_leave(self.confidences, thresholds) & self.disagrees).any(axis=0)
        return ExitOutcome(
            exits=exits,
            disagreements=self._per_document(wrong),
            at_worst=self._per_document(risky),
            sizes=self.sizes,
            share_per_exit=np.bincount(exits, minlength=len(self.layers) + 1) / len(exits),
            mean_layers=float(self.depths[exits].mean()),
        )

    def _per_document(self, tokens: np.ndarray) -> np.ndarray:
        return np.bincount(self.documents, weights=tokens, minlength=len(self.sizes))


@dataclass(frozen=True)
class ExitOutcome:
    """What thresholds did with given text.

    Attributes:
        exits: [T] what `first_exits` says.
        disagreements: [D] tokens per document whose token differs from the final exit's, every exit being asked.
        at_worst: [D] tokens per document for which some exit would let another token go than the final exit's.
            Whichever exits are asked at each token, no more than these differ.
        sizes: [D] tokens per document.
        share_per_exit: [E + 1] shares of tokens that leave at each exit, the final exit last.
        mean_layers: layers that run before a token is emitted, mean over tokens.
    """

    exits: np.ndarray
    disagreements: np.ndarray
    at_worst: np.ndarray
    sizes: np.ndarray
    share_per_exit: np.ndarray
    mean_layers: float

    @property
    def agreement(self) -> float:
        """Share of tokens that equal the final exit's, every exit being asked."""
        return 1.0 - float(self.disagreements.sum() / self.sizes.sum())

    @property
    def agreement_at_worst(self) -> float:
        """No lower than this, whichever exits are asked at each token."""
        return 1.0 - float(self.at_worst.sum() / self.sizes.sum())


def would_leave(confidences: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """[E, T] whether each exit, were it asked, would let each token go."""
    return leaves(confidences, np.asarray(thresholds, dtype=np.float64)[:, None])


def first_exits(confidences: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """The exit that each token leaves at: the first that it leaves by `leaves`.

    Args:
        confidences: [E, T].
        thresholds: E of them; one of 1.0 lets nothing leave.

    Returns:
        [T] positions from 0 to E - 1, and E for the final exit.
    """
    sure = would_leave(confidences, thresholds)
    return np.where(sure.any(axis=0), sure.argmax(axis=0), len(confidences))
