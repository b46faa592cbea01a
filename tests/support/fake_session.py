# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A decoding session without a model: its tokens, exits and confidences are functions of the prompt."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nemo_ee.decoding.logprobs import TokenLogprobs
from nemo_ee.server.probe import PROMPT as PROBE

EXIT_LAYERS = (2, 4, 8)
FIRST_WORD, WORDS = 6, 195
"""Token ids of `tests.support.tiny_gpt`'s tokenizer that are plain words."""


def token_of(prompt: list[int], position: int) -> int:
    """The token at that place of the continuation."""
    return FIRST_WORD + (sum(prompt) * 31 + len(prompt) * 17 + position * position * 7) % WORDS


def layer_of(prompt: list[int], position: int) -> int:
    """Its exit layer; the first comes from the final one."""
    return EXIT_LAYERS[-1] if position == 0 else EXIT_LAYERS[(sum(prompt) + position) % 3]


def confidence_of(prompt: list[int], position: int) -> float:
    """Its exit's confidence."""
    return ((sum(prompt) + 13 * position) % 100) / 100


def logprob_of(token: int, place: int) -> float:
    """Of a token at a place of the text, its prompt included."""
    return -((token * 7 + place * 3) % 50) / 8


def said_of(token: int, place: int, top: int) -> TokenLogprobs:
    """What a prediction says of it: the most probable tokens are those before it, or itself and those."""
    best = [(max(0, token - n), logprob_of(token, place) / (n + 2)) for n in range(1, top + 1)]
    return TokenLogprobs(token, logprob_of(token, place), tuple(sorted(best, key=lambda pair: -pair[1])))


class FakeSession:
    """Has the methods of `nemo_ee.decoding.session.DecodingSession`, and notes how they are called.

    Args:
        slots: sequences at a time.
        token: chooses tokens; by default `token_of`.
        step_seconds: how long every step takes.
        per_step: tokens that a sequence gets in a step, as in lossless decoding.

    Attributes:
        added: numbers of sequences, and of their prompt tokens, of every `add` but the engine's own.
        removed: sequences that were cancelled.
        fail: raised by the next `add` or `step` but the engine's own.
        is_nan: whether a prompt's predictions are NaN at a place of the continuation.
    """

    def __init__(
        self,
        slots: int = 4,
        token: Callable[[list[int], int], int] = token_of,
        step_seconds: float = 0.0,
        per_step: int = 1,
    ):
        self.slots, self.token, self.step_seconds, self.per_step = slots, token, step_seconds, per_step
        self.running: list = []
        self.added: list[tuple[int, int]] = []
        self.removed: list = []
        self.steps = 0
        self.fail: Exception | None = None
        self.is_nan: Callable[[list[int], int], bool] = lambda prompt, place: False

    @property
    def free(self) -> int:
        return self.slots - len(self.running)

    def add(self, sequences: list) -> list:
        assert len(sequences) <= self.free
        if not _only_probes(sequences):
            self.added.append((len(sequences), sum(len(s.prompt) for s in sequences)))
        self.running += sequences
        self._raise(sequences)
        for sequence in sequences:
            sequence.statistics.layers_run += len(sequence.prompt) * EXIT_LAYERS[-1]
            if (top := sequence.request.sampling.prompt_logprobs) is not None:
                said = [said_of(token, i, top) for i, token in enumerate(sequence.prompt)]
                sequence.prompt_logprobs = [None, *said[1:]]
            if sequence.limit:
                self._next(sequence)
            else:
                sequence.finish_reason = "length"
        return self._retire()

    def step(self) -> list:
        self.steps += 1
        time.sleep(self.step_seconds)
        self._raise(self.running)
        for sequence in self.running:
            for _ in range(self.per_step):
                if sequence.finish_reason is None:
                    self._next(sequence)
        return self._retire()

    def remove(self, sequence) -> None:
        self.removed.append(sequence)
        sequence.finish_reason = "cancelled"
        self._retire()

    def _next(self, sequence) -> None:
        place, prompt = len(sequence.tokens), sequence.prompt
        layer = layer_of(prompt, place)
        sequence.statistics.layers_run += layer if place else 0
        confidence = float("nan") if self.is_nan(prompt, place) else confidence_of(prompt, place)
        token = self.token(prompt, place)
        if (top := sequence.request.sampling.logprobs) is not None:
            sequence.logprobs.append(said_of(token, len(prompt) + place, top))
        sequence.commit(token, layer, confidence)

    def _retire(self) -> list:
        finished = [s for s in self.running if s.finish_reason is not None]
        self.running = [s for s in self.running if s.finish_reason is None]
        return finished

    def _raise(self, sequences: list) -> None:
        if self.fail is not None and not _only_probes(sequences):
            error, self.fail = self.fail, None
            raise error

    @contextmanager
    def opened(self) -> Iterator["FakeSession"]:
        """For `Engine`: the same object as a new session, empty."""
        self.running = []
        yield self


def _only_probes(sequences: list) -> bool:
    return all(sequence.prompt == PROBE for sequence in sequences)
