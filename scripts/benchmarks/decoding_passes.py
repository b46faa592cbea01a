# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What early-exit decoding runs, pass by pass, and how long each pass takes by itself.

The decoder is watched from outside: its method that runs segments (the layers between two exits) is wrapped,
and the exits' predictions are. That costs a few microseconds per pass.
"""

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from nemo_ee.inference.decoder import EarlyExitDecoder
from nemo_ee.inference.exit_point import ExitPoint
from nemo_ee.inference.generate import generating
from nemo_ee.megatron.decoding_model import DecodingModel
from nemo_ee.megatron.lean_head import LeanOutput
from nemo_ee.megatron.packed_tokens import PackedTokens

FINAL = "final exit"


class Pass(NamedTuple):
    """One call of a part of the model.

    Attributes:
        part: a segment (`layers 1-10`), an exit's head (`exit 10`) or `FINAL`, the final norm and output layer.
        sequences: in the call; of a head, the rows that it predicts from.
        tokens: of all of them.
    """

    part: str
    sequences: int
    tokens: int


@contextmanager
def counted(passes: Counter[Pass]) -> Iterator[None]:
    """Counts in `passes` what decoders run inside, prompts apart."""
    run_segments, ask_exit, ask_final = EarlyExitDecoder._run_segments, ExitPoint.predict, LeanOutput.predict

    def segments(decoder: EarlyExitDecoder, first: int, last: int, x: Tensor, packed: PackedTokens) -> Tensor:
        for name in segment_names(decoder)[first : last + 1]:
            passes[Pass(name, len(packed.rows), len(x))] += 1
        return run_segments(decoder, first, last, x, packed)

    def exit_(point: ExitPoint, x: Tensor, *others: Any) -> Any:
        passes[Pass(f"exit {point.layer}", len(x), len(x))] += 1
        return ask_exit(point, x, *others)

    def final(output: LeanOutput, x: Tensor) -> Any:
        passes[Pass(FINAL, len(x), len(x))] += 1
        return ask_final(output, x)

    with (
        patch.object(EarlyExitDecoder, "_run_segments", segments),
        patch.object(ExitPoint, "predict", exit_),
        patch.object(LeanOutput, "predict", final),
    ):
        yield


def segment_names(decoder: EarlyExitDecoder) -> list[str]:
    """A name per segment, by its layers."""
    edges = [0, *(point.layer for point in decoder.exits), decoder.final_layer]
    return [f"layers {low + 1}-{high}" for low, high in zip(edges[:-1], edges[1:], strict=True)]


class PassTimes:
    """Seconds of a pass, between measured ones by interpolation: linear in the number of sequences, and in
    tokens per sequence.

    Args:
        seconds: of measured passes.
    """

    def __init__(self, seconds: Mapping[Pass, float]):
        self.seconds = dict(seconds)

    def __call__(self, part: str, sequences: float, tokens: float) -> float:
        """Seconds of one pass; averages of counts will do.

        Raises:
            KeyError: its neighbours (see `neighbours`) were not measured.
        """
        if _is_head(part):
            return self._between(sequences, lambda rows: self.seconds[Pass(part, rows, rows)])
        each = tokens / sequences
        return self._between(
            sequences,
            lambda n: self._between(each, lambda m: self.seconds[Pass(part, n, n * m)]),
        )

    @staticmethod
    def _between(x: float, at: Callable[[int], float]) -> float:
        low, high = _around(x)
        return at(low) if low == high else (at(low) * (high - x) + at(high) * (x - low)) / (high - low)

    def total(self, passes: Mapping[Pass, int]) -> float:
        """Seconds of all passes, one after the other."""
        return sum(count * self(*each) for each, count in passes.items())


def _is_head(part: str) -> bool:
    return not part.startswith("layers")


def _around(x: float) -> tuple[int, int]:
    """The powers of two next to x, at least 1; both x if it is one."""
    low = 1
    while 2 * low <= x:
        low *= 2
    return low, low if x == low else 2 * low


class Step(NamedTuple):
    """A pass through all segments and exits, to be timed part by part.

    Attributes:
        sequences: in it.
        tokens: of all of them.
        rows: how many of the tokens' states the exits predict from.
    """

    sequences: int
    tokens: int
    rows: int


def neighbours(passes: Iterable[Pass], batch: int) -> set[Step]:
    """Steps of at most `batch` sequences to measure so that `PassTimes` knows these passes."""
    steps = set()
    for part, sequences, tokens in passes:
        for n in _around(sequences):
            if _is_head(part):
                steps.add(Step(n if n <= batch else 1, n, n))
            else:
                steps |= {Step(n, n * m, n) for m in _around(tokens / sequences)}
    return steps


class PassTimer:
    """Times the passes of whole steps, which go through segments and exits in order.

    So each pass finds the processor's caches as the one before it left them, as in decoding.

    Args:
        model: a `MegatronGPTEarlyExitModel`.
        rows: sequences of the decoder.
        length: positions of each sequence after a step, at least.
    """

    def __init__(self, model: Any, rows: int, length: int):
        self.model, self.rows, self.length = model, rows, length
        self.seconds: dict[Pass, list[float]] = defaultdict(list)
        self._rounds: Counter[Step] = Counter()

    def add(self, steps: Iterable[Step]) -> None:
        """More steps to time."""
        for step in steps:
            self._rounds[step] += 0

    def round(self) -> None:
        """Times every step once."""
        self._time(sorted(self._rounds))

    def complete(self, rounds: int) -> None:
        """Times steps again that came late."""
        while steps := sorted(step for step, done in self._rounds.items() if done < rounds):
            self._time(steps)

    def _time(self, steps: list[Step]) -> None:
        rows = max(self.rows, *(step.sequences for step in steps))
        length = max(self.length, *(step.tokens // step.sequences for step in steps))
        with generating(self.model):
            model = DecodingModel(self.model.gpt)
            decoder = filled_decoder(model, self.model.early_exit.layers, rows, length)
            list(_timed_step(decoder, length, steps[0]))  # warms up
            for step in steps:
                self._rounds[step] += 1
                for each, seconds in _timed_step(decoder, length, step):
                    self.seconds[each].append(seconds)

    def medians(self) -> dict[Pass, float]:
        """Of every pass."""
        return {each: statistics.median(times) for each, times in self.seconds.items()}


def filled_decoder(
    model: DecodingModel, exit_layers: Sequence[int], rows: int, length: int, more: int = 0
) -> EarlyExitDecoder:
    """A decoder of sequences that have been through all layers, as far as it knows; their keys are zero.

    Args:
        model: the whole model.
        exit_layers: see `EarlyExitDecoder`.
        rows: sequences.
        length: tokens of each.
        more: positions to reserve beyond.
    """
    decoder = EarlyExitDecoder(model, exit_layers, rows, length + more)
    decoder.filled = [[length] * rows for _ in decoder.segments]
    decoder.layers_run = [0] * rows
    return decoder


def _timed_step(decoder: EarlyExitDecoder, length: int, step: Step) -> Iterator[tuple[Pass, float]]:
    """An exit's block belongs to the segment before it."""
    sequences, tokens, rows = step
    count = tokens // sequences
    # The last rows: in decoding, too, the sequences that go on are seldom the first ones.
    where = list(range(decoder.rows - sequences, decoder.rows))
    x = decoder.model.hidden.new_ones(tokens, decoder.model.hidden.shape[-1])

    def run_segment(k: int) -> tuple[Tensor, Tensor]:
        packed = PackedTokens(decoder.table, where, [length - count] * sequences, [count] * sequences)
        out = decoder._run_segments(k, k, x, packed)
        return out, decoder.exits[k].enter_block(out, packed) if k < len(decoder.exits) else out

    def ask(k: int) -> Any:
        if k == len(decoder.exits):
            return decoder.model.output.predict(x[:rows]).confidence.tolist()
        return decoder.exits[k].predict(x[:rows], inside[:rows], list(range(rows)), None)

    heads = [*(f"exit {point.layer}" for point in decoder.exits), FINAL]
    for k, (name, head) in enumerate(zip(segment_names(decoder), heads, strict=True)):
        (x, inside), seconds = timed(lambda: run_segment(k))  # noqa: B023
        yield Pass(name, sequences, tokens), seconds
        yield Pass(head, rows, rows), timed(lambda: ask(k))[1]  # noqa: B023


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its seconds."""
    synchronise()
    begin = time.perf_counter()
    result = run()
    synchronise()
    return result, time.perf_counter() - begin


def synchronise() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
