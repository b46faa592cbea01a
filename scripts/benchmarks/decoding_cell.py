# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""One cell of decoding.py: all ways on the same prompts, of one batch size and prompt length."""

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from decoding_memory import peak_bytes
from decoding_passes import Pass, PassTimer, Step, neighbours
from decoding_quality import Judge, Quality
from decoding_roofline import Bandwidth, Products, cache_bytes, weight_bytes
from decoding_ways import (
    ASSISTED,
    BF16_LOSSLESS,
    EXITS,
    FULL,
    INT8,
    LOSSLESS,
    NEMO,
    ROUNDED,
    Clock,
    Tokens,
    Way,
)

from nemo_ee.data.index_file import open_indexed_file
from nemo_ee.errors import GenerationError
from nemo_ee.evaluation.held_out import held_out_sequences
from nemo_ee.evaluation.settings import HeldOutConfig
from nemo_ee.evaluation.sweep import document_prompts

LARGE = 1024
"""Prompt tokens of a batch above which a cell has one threshold only."""
SINGLE = (NEMO, ASSISTED, INT8)
"""Ways that run at batch 1 only: two are slow, and transformers' assistant takes no more."""
FEW, SECONDS, PATIENCE = 3, 20.0, 30.0
"""A way is timed in a few repetitions, and in more while its calls take less than so many seconds together;
one whose first call takes longer than its patience is left out."""
JUDGED_TOKENS = 2048
"""Prompt tokens that the full model reads to judge one way."""
READINGS = 5
"""Of each pass, at least."""


@dataclass
class Call:
    """A timed call.

    Attributes:
        repeat: the repetition, counted from 0.
        seconds: in all.
        first: to the first token.
        first_tokens: per sequence, at that time.
        passes: what our decoder ran after it: part, sequences, tokens, and how often.
        drafts: of our lossless decoding.
        accepted: of them.
    """

    repeat: int
    seconds: float
    first: float
    first_tokens: int
    passes: list[tuple[str, int, int, int]]
    drafts: int
    accepted: int


@dataclass
class Measured:
    """What a cell found about one way.

    Attributes:
        peak: bytes, see `peak_bytes`.
        first_call: seconds of the call that warmed up.
    """

    way: Way
    peak: int | None
    first_call: float
    calls: list[Call] = field(default_factory=list)
    quality: Quality = field(default_factory=Quality)

    def as_dict(self) -> dict:
        """Plain values."""
        way = self.way
        return {
            "name": way.name,
            "kind": way.kind,
            "threshold": way.threshold,
            "parameters": way.parameters,
            "peak": self.peak,
            "calls": [asdict(call) for call in self.calls],
            "quality": asdict(self.quality),
        }


def chosen_ways(ways: Sequence[Way], batch: int, prompt: int) -> list[Way]:
    """The ways of a cell. Early exits run at every threshold; with batches also lossless ones, and all where
    the cell is large, only at the one in the middle."""
    thresholds = sorted({way.threshold for way in ways if way.threshold is not None})
    middle = thresholds[len(thresholds) // 2]
    large = batch * prompt > LARGE

    def runs(way: Way) -> bool:
        if way.kind in SINGLE:
            return batch == 1
        one = large or (way.kind in (LOSSLESS, BF16_LOSSLESS) and batch > 1)
        return way.threshold in (None, middle) or not one

    return [way for way in ways if runs(way)]


def read_prompts(prefix: str, count: int, tokens: int, vocabulary: int) -> tuple[Tokens, str]:
    """Beginnings of documents; where not enough of them are that long, pieces of the whole text. And which."""
    if (open_indexed_file(prefix).sequence_lengths > tokens).sum() >= count:
        return document_prompts(HeldOutConfig(prefix), count, tokens), "beginnings of documents"
    pieces = held_out_sequences(prefix, count, tokens, vocabulary)[:, :tokens].tolist()
    return pieces, "pieces of text, over the ends of documents"


def run_cell(model: Any, ways: list[Way], prompts: Tokens, batch: int, count: int, repeats: int) -> dict:
    """Measures one cell.

    Args:
        model: a `MegatronGPTEarlyExitModel`.
        ways: to compare.
        prompts: of equal length; each repetition takes the next `batch` of them, from the first again
            where there are not enough.
        batch: sequences at a time.
        count: tokens to generate.
        repeats: repetitions.

    Returns:
        Plain values for JSON.
    """
    gpt, length = model.gpt, len(prompts[0])
    bandwidth = Bandwidth(weight_bytes(gpt), gpt.output_weight().device)
    timer = PassTimer(model, batch, length + count // 2)
    if batch == 1:
        timer.add(Step(1, tokens, 1) for tokens in (1, 2, 4, 8, 16))
    products = Products(model) if batch == 1 else None

    def texts(repeat: int) -> Tokens:
        return [prompts[(repeat * batch + row) % len(prompts)] for row in range(batch)]

    measured, left_out = _warm_up(ways, texts(0), count)
    for repeat in range(repeats):
        bandwidth.read()
        if products is not None:
            products.read()
        now = [m for m in measured if repeat < max(FEW, SECONDS / m.first_call)]
        if all(m.way.kind == FULL for m in now):
            break
        if all(m.way.kind != FULL for m in now):  # others are compared with it
            now = [m for m in measured if m in now or m.way.kind == FULL]
        shuffled = random.Random(repeat).sample(now, len(now))  # noqa: S311
        generated = {m.way.name: _timed_call(m, texts(repeat), count, repeat) for m in shuffled}
        timer.add(neighbours({Pass(*each[:3]) for m in now for each in m.calls[-1].passes}, batch))
        timer.round()
        if batch * repeat * length < JUDGED_TOKENS:
            _judge(model, now, texts(repeat), generated)
    timer.complete(READINGS)
    return {
        "ways": [m.as_dict() for m in measured],
        "left_out": left_out,
        "pass_times": [[*each, seconds] for each, seconds in sorted(timer.medians().items())],
        "bandwidth": bandwidth.medians(),
        "products": {} if products is None else products.medians(),
        "weight_bytes": weight_bytes(gpt),
        "cache_bytes": cache_bytes(gpt, length + count // 2),
    }


def _warm_up(ways: list[Way], prompts: Tokens, count: int) -> tuple[list[Measured], dict[str, str]]:
    """Runs every way once for its memory; returns those to be timed, and why others are not."""
    measured, left_out = [], {}
    for way in ways:
        begin, reason = time.perf_counter(), None
        try:
            peak = peak_bytes(lambda way=way: way.generate(prompts, count, Clock()))
            seconds = time.perf_counter() - begin
            if seconds > PATIENCE:
                reason = f"its first call took {seconds:.0f} s"
        except NotImplementedError as error:
            reason = str(error)
        if reason is None:
            measured.append(Measured(way, peak, seconds))
        else:
            left_out[way.name] = reason
            print(f"  {way.name}: left out: {reason}", flush=True)
    return measured, left_out


def _timed_call(m: Measured, prompts: Tokens, count: int, repeat: int) -> Tokens:
    # So that no way pays for what the one before it left in the caches.
    m.way.generate([prompt[:8] for prompt in prompts], 2, Clock())
    clock = Clock()
    texts = m.way.generate(prompts, count, clock)
    seconds = clock.seconds()
    if not clock.first_tokens or any(len(text) != count for text in texts):
        raise GenerationError(f"{m.way.name}: not every text has {count} new tokens, asked for one by one")
    passes = [(*each, often) for each, often in clock.passes.items()]
    m.calls.append(
        Call(repeat, seconds, clock.first, clock.first_tokens, passes, clock.drafts, clock.accepted)
    )
    return texts


def _judge(model: Any, measured: list[Measured], prompts: Tokens, generated: dict[str, Tokens]) -> None:
    """Adds a repetition's texts to each way's quality; of a large batch, its first sequences."""
    few = max(1, JUDGED_TOKENS // len(prompts[0]))
    judge = Judge(model, prompts[:few], generated[FULL][:few])
    for m in measured:
        texts = generated[m.way.name][:few]
        if m.way.kind == EXITS:
            judge.exits(m.way.threshold, texts, m.quality)
        else:
            judge.whole(texts, m.quality)


def check_same_weights(row: dict, epsilon: float) -> None:
    """All ways at full depth with the model's own weights must generate the same tokens, but where two are as
    probable within rounding.

    Raises:
        GenerationError: some do not.
    """
    for way in row["ways"]:
        worst = max((abs(gap) for gap in way["quality"]["gaps"]), default=0.0)
        if way["kind"] not in (EXITS, *ROUNDED) and worst > epsilon:
            raise GenerationError(
                f"{way['name']}: its text leaves full depth's where the full model prefers its own token by "
                f"{worst:.2g} in the logit, more than {epsilon:g}: give --model and --hf of the same weights"
            )
