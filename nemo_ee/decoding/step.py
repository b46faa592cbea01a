# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What one decoding step predicts."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nemo_ee.decoding.prediction import Prediction
from nemo_ee.decoding.transfer import to_device, to_host

UNANSWERED = 0
"""In place of an exit layer: the sequence's token is held back, see `EarlyExitDecoder.step`."""


@dataclass(frozen=True)
class Part:
    """One exit's predictions for some of a step's sequences.

    Attributes:
        indices: of the sequences within the step.
        asked: the exit's prediction, for these and others that go on.
        places: which of its tokens are these sequences'.
    """

    indices: list[int]
    asked: Prediction
    places: list[int]

    @cached_property
    def prediction(self) -> Prediction:
        """For these sequences, in that order; most steps never need it."""
        return self.asked.select(self.places)


@dataclass
class Step:
    """Predictions for N sequences; the same on all tensor-parallel ranks.

    Attributes:
        exit_layers: [N] the exit that each prediction comes from; `num_layers` for the final one, `UNANSWERED`
            for none.
        parts: the exits that answered.
    """

    exit_layers: list[int]
    parts: list[Part] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._confidences = [0.0] * len(self.exit_layers)
        self._tokens = [0] * len(self.exit_layers)
        self._unread: Part | None = None

    @classmethod
    def unanswered(cls, count: int) -> "Step":
        """A step whose answers are still to come."""
        return cls([UNANSWERED] * count)

    def add(
        self, layer: int, part: Part, confidences: list[float] | None = None, tokens: list[int] | None = None
    ) -> None:
        """Answers some sequences from one exit.

        Args:
            layer: the exit's.
            part: its predictions.
            confidences: for `part.asked`, where they are known on the host.
            tokens: likewise, the most probable ones. None of both are read when they are asked for, or along with
                what is read before (the final exit's; at most one part of a step).
        """
        self.parts.append(part)
        for i in part.indices:
            self.exit_layers[i] = layer
        if confidences is None or tokens is None:
            assert self._unread is None, "one part at most"
            self._unread = part
        else:
            self._note(part, confidences, tokens)

    @classmethod
    def of_final(cls, prediction: Prediction, final_layer: int) -> "Step":
        """Predictions that all come from the final exit."""
        step, every = cls.unanswered(len(prediction.tokens)), list(range(len(prediction.tokens)))
        step.add(final_layer, Part(every, prediction, every))
        return step

    @property
    def answered(self) -> list[int]:
        """Indices of the n sequences that have an answer, ascending."""
        return [i for i, layer in enumerate(self.exit_layers) if layer != UNANSWERED]

    @property
    def confidences(self) -> list[float]:
        """[N] an exit's by the rule in use; the final exit's probability of its most probable token."""
        self.read()
        return self._confidences

    def most_probable(self) -> list[int]:
        """[n] the most probable token of each answer, in the order of `answered`."""
        self.read()
        return [self._tokens[i] for i in self.answered]

    def read(self, *others: Tensor) -> list[list[Any]]:
        """What other tensors [.] on the device hold; what of this step is still there is read along with them."""
        part, self._unread = self._unread, None
        if part is None:
            return to_host(*others) if others else []
        confidences, tokens, *values = to_host(part.asked.confidence, part.asked.tokens, *others)
        self._note(part, confidences, tokens)
        return values

    def greedy_tokens(self) -> Tensor:
        """[n] the most probable token of each answer on the device, in the order of `answered`."""
        return self._join([part.prediction.tokens for part in self.parts])

    def vocabulary_shard(self, shard_size: int, own: bool = False) -> Tensor:
        """Logits [n, Vp/TP] of this rank's share of the vocabulary, see `Prediction.vocabulary_shard`."""
        return self._join([part.prediction.vocabulary_shard(shard_size, own) for part in self.parts])

    def own_normaliser(self) -> Tensor:
        """[n] see `Prediction.own_normaliser`."""
        return self._join([part.prediction.own_normaliser() for part in self.parts])

    def _note(self, part: Part, confidences: list[float], tokens: list[int]) -> None:
        for i, place in zip(part.indices, part.places, strict=True):
            self._confidences[i], self._tokens[i] = confidences[place], tokens[place]

    def _join(self, pieces: list[Tensor]) -> Tensor:
        if len(pieces) == 1:  # an exit answers in ascending order
            return pieces[0]
        indices = [i for part in self.parts for i in part.indices]
        order = sorted(range(len(indices)), key=indices.__getitem__)
        return torch.cat(pieces)[to_device(order, pieces[0].device)]  # in the widest of their dtypes
