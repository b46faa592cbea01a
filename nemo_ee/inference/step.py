# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What one decoding step predicts."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_ee.megatron.prediction import Prediction

UNANSWERED = 0
"""In place of an exit layer: the sequence's token is held back, see `EarlyExitDecoder.step`."""


@dataclass(frozen=True)
class Part:
    """One exit's predictions for some of a step's sequences.

    Attributes:
        indices: of the sequences within the step.
        prediction: for them, in that order.
    """

    indices: list[int]
    prediction: Prediction


@dataclass
class Step:
    """Predictions for N sequences; the same on all tensor-parallel ranks.

    Attributes:
        exit_layers: [N] the exit that each prediction comes from; `num_layers` for the final one, `UNANSWERED`
            for none.
        confidences: [N] an exit's by the rule in use; the final exit's probability of its most probable token.
        parts: the exits that answered.
    """

    exit_layers: list[int]
    confidences: list[float]
    parts: list[Part] = field(default_factory=list)

    @classmethod
    def unanswered(cls, count: int) -> "Step":
        """A step whose answers are still to come."""
        return cls([UNANSWERED] * count, [0.0] * count)

    def add(self, layer: int, indices: list[int], prediction: Prediction, confidences: list[float]) -> None:
        """Answers some sequences from one exit."""
        self.parts.append(Part(indices, prediction))
        for i, value in zip(indices, confidences, strict=True):
            self.exit_layers[i], self.confidences[i] = layer, value

    @classmethod
    def of_final(cls, prediction: Prediction, final_layer: int) -> "Step":
        """Predictions that all come from the final exit."""
        step = cls.unanswered(len(prediction.tokens))
        step.add(final_layer, list(range(len(prediction.tokens))), prediction, prediction.confidence.tolist())
        return step

    @property
    def answered(self) -> list[int]:
        """Indices of the n sequences that have an answer, ascending."""
        return [i for i, layer in enumerate(self.exit_layers) if layer != UNANSWERED]

    def greedy_tokens(self) -> Tensor:
        """[n] the most probable token of each answer, in the order of `answered`."""
        return self._join([part.prediction.tokens for part in self.parts])

    def vocabulary_shard(self, shard_size: int) -> Tensor:
        """Logits [n, Vp/TP] of this rank's share of the vocabulary, see `Prediction.vocabulary_shard`."""
        return self._join([part.prediction.vocabulary_shard(shard_size) for part in self.parts])

    def _join(self, pieces: list[Tensor]) -> Tensor:
        if len(pieces) == 1:  # an exit answers in ascending order
            return pieces[0]
        indices = torch.tensor([i for part in self.parts for i in part.indices], device=pieces[0].device)
        return torch.cat(pieces)[indices.argsort()]  # in the widest of their dtypes
