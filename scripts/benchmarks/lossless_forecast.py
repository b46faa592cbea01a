# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What lossless decoding should gain: from how often exits are sure, and right then, and from the time of passes.

Both are measured here by themselves, apart from lossless decoding: the first on the full model's own texts, the second
by passes of any tokens. The best round is the one that is expected to give most tokens per second.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from decoding_passes import filled_decoder, timed

from nemo_ee.inference.decoder import EarlyExitDecoder
from nemo_ee.inference.drafting import expected_rate
from nemo_ee.inference.generate import generating
from nemo_ee.inference.request import NEVER
from nemo_ee.megatron.packed_tokens import PackedTokens

LONGEST = 4
"""Drafts of a round that are considered; longer rounds were not better anywhere."""


class Forecast(NamedTuple):
    """The round that should pay most.

    Attributes:
        speed: tokens per second over full depth's; 1 where no round pays, and then the rest says nothing.
        layer: of the exit that drafts.
        length: drafts per sequence, at most.
        sure: how often that exit is.
        right: how often the full model agrees then.
    """

    speed: float = 1.0
    layer: int = 0
    length: int = 0
    sure: float = 0.0
    right: float = 0.0


class MeasuredCosts:
    """Seconds of passes, between measured ones by linear interpolation; see `PassCosts`.

    Args:
        seconds: kind of pass and exit index -> tokens -> times.
    """

    def __init__(self, seconds: dict[tuple[str, int], dict[int, list[float]]]):
        self._points = {
            kind: sorted((tokens, statistics.median(found)) for tokens, found in times.items())
            for kind, times in seconds.items()
        }

    def _at(self, kind: str, exit_index: int, tokens: float) -> float:
        x, y = zip(*self._points[kind, exit_index], strict=True)
        return float(np.interp(tokens, x, y))

    def full_depth(self, tokens: float) -> float:
        """A token at full depth for each of some sequences."""
        return self._at("full", 0, tokens)

    def shallow(self, exit_index: int, tokens: float) -> float:
        """Tokens in one pass to an exit that is not asked."""
        return self._at("shallow", exit_index, tokens)

    def asked(self, exit_index: int, tokens: float) -> float:
        """What it takes longer if that exit is asked."""
        return max(self._at("asked", exit_index, tokens) - self.shallow(exit_index, tokens), 0.0)

    def verify(self, exit_index: int, tokens: float) -> float:
        """Tokens in one pass from an exit on."""
        return self._at("verify", exit_index, tokens)


class RoundTimer:
    """Times the passes of rounds.

    Args:
        model: a `MegatronGPTEarlyExitModel`.
        batch: sequences.
        length: positions of each before a round.
    """

    def __init__(self, model: Any, batch: int, length: int):
        self._model, self._batch, self._length = model, batch, length
        self._seconds: dict[tuple[str, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))

    def round(self) -> None:
        """Times every pass once."""
        with generating(self._model):
            model, layers = self._model.decoding_model(), self._model.early_exit.layers
            decoder = filled_decoder(model, layers, self._batch, self._length, more=LONGEST + 1)
            for _ in range(1 if self._seconds else 2):  # the very first warms up
                found = list(self._passes(decoder))
        for kind, exit_index, tokens, seconds in found:
            self._seconds[kind, exit_index][tokens].append(seconds)

    def costs(self) -> "MeasuredCosts":
        """Medians of all rounds."""
        return MeasuredCosts(self._seconds)

    def _passes(self, decoder: EarlyExitDecoder) -> Iterator[tuple[str, int, int, float]]:
        """Kind, exit index, tokens and seconds of passes, in the order of rounds: so each finds the processor's
        caches as in decoding."""
        for n in sorted({self._batch, *(min(n, self._batch) for n in (1, 2, 4, 8, 16, 32))}):
            rows = list(range(self._batch - n, self._batch))
            for _ in range(2):
                yield "full", 0, n, self._step(decoder, rows, None)
                self._forget(decoder)
            for k in range(len(decoder.exits)):
                for drafts in range(LONGEST + 1):
                    for _ in range(drafts):
                        yield "asked", k, n, self._step(decoder, rows, k, asked=True)
                    yield "shallow", k, n, self._step(decoder, rows, k)
                    yield "verify", k, n * (drafts + 1), timed(lambda: decoder.flush(rows))[1]  # noqa: B023
                    self._forget(decoder)

    def _step(
        self, decoder: EarlyExitDecoder, rows: list[int], exit_index: int | None, asked: bool = False
    ) -> float:
        """Seconds of a token for each row, to an exit or all the way."""
        thresholds = [-1.0 if asked and k == exit_index else NEVER for k in range(len(decoder.exits))]
        tokens = torch.ones(len(rows), dtype=torch.long, device=decoder.model.device)
        hold = [exit_index] * len(rows)
        return timed(lambda: decoder.step(tokens, [thresholds] * len(rows), rows, hold=hold))[1]

    def _forget(self, decoder: EarlyExitDecoder) -> None:
        for row in range(self._batch):
            decoder.roll_back(row, self._length)


def frequencies(model: Any, texts: Sequence[tuple[list[int], list[int]]], threshold: float) -> list[tuple]:
    """How often each exit is sure of the next token of the full model's own texts, and right then.

    Args:
        model: a `MegatronGPTEarlyExitModel`.
        texts: prompt and continuation, greedy at full depth.
        threshold: sure above it.

    Returns:
        Of each exit counts: tokens, those that it is sure of, and of these those that it is right in.
    """
    layers = model.early_exit.layers
    counts = np.zeros((len(layers), 3), dtype=int)
    with generating(model):
        decoding = model.decoding_model()
        decoder = EarlyExitDecoder(decoding, layers, 1, max(len(a) + len(b) for a, b in texts))
        for prompt, continuation in texts:
            fed = [*prompt, *continuation[:-1]]
            decoder.prefill([fed])
            packed = PackedTokens(decoder.table, [0], [0], [len(fed)])
            # The first token is the prompt's, which is never drafted.
            where, chosen = slice(len(prompt), len(prompt) + len(continuation) - 1), continuation[1:]
            for k, point in enumerate(decoder.exits):
                inside = point.enter_block(point.hidden[0, : packed.length], packed)[where]
                predicted = decoding.draft_head(point.layer).predict(inside)
                sure = predicted.confidence > threshold
                right = sure & (predicted.tokens == torch.tensor(chosen, device=sure.device))
                counts[k] += (len(chosen), int(sure.sum()), int(right.sum()))
            decoder.drop([0])
    return [tuple(row) for row in counts.tolist()]


def forecast(costs: MeasuredCosts, found: Sequence[tuple], layers: Sequence[int], batch: int) -> Forecast:
    """The best round.

    Args:
        costs: of passes.
        found: see `frequencies`.
        layers: of the exits.
        batch: sequences.
    """
    best = Forecast()
    alone = batch / costs.full_depth(batch)
    for k, (layer, (tokens, sure, right)) in enumerate(zip(layers, found, strict=True)):
        often = (sure / tokens, right / sure) if sure else (0.0, 0.0)
        for length in range(1, LONGEST + 1):
            speed = expected_rate(costs, k, length, batch, *often) / alone
            if speed > best.speed:
                best = Forecast(speed, layer, length, *often)
    return best
