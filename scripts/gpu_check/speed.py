# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Decoding speed: full depth, exits and lossless, CUDA graphs on and off, beside transformers and the bandwidth.

All ways continue the same prompts with the same weights, greedily, and take turns in random order.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import decoding_ways
import hugging_face
import random_model
import tiny
import torch
from decoding_roofline import Bandwidth, cache_bytes, weight_bytes
from decoding_ways import SAMPLING, Clock, HuggingFace, Tokens
from result import Result
from tokens import check_graphs, warnings_about_graphs

from nemo_ee.decoding.assumed_prices import prices_of
from nemo_ee.decoding.leaving import is_asked
from nemo_ee.decoding.policy.exit_policy import ExitPolicy, Round
from nemo_ee.generation.generating import generating
from nemo_ee.report.statistics import spread
from nemo_ee.runtime.upstream.cuda_graphs import counted_replays

if TYPE_CHECKING:
    from part import Settings

BATCHES = 1, 16
SHARE = 0.4
"""Of the tokens that are asked for at an exit of the random model, so many are to leave there."""
DRAFTS = 3
LOSSLESS, DRAFTING = "lossless", "lossless, always drafting"
"""With the policy, which drafts where it expects a gain, and without."""
TRANSFORMERS = "transformers"
SAME_START = 0.5
"""Of several prompts, at least so many must have transformers' first token. bfloat16 rounds to three digits, so that
two ways often differ in the end; another model's first tokens hardly ever are the same. One prompt alone says nothing:
its two best tokens may be as good as equal."""


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        prompt: tokens of each.
        new: tokens to generate.
        seconds: of repetitions, per batch size; beyond the fewest one begins only while there is time.
        fewest: repetitions.
        most: repetitions.
    """

    prompt: int
    new: int
    seconds: float
    fewest: int
    most: int


FULL, QUICK = Effort(128, 64, 24.0, 3, 9), Effort(6, 8, 0.0, 1, 1)


@dataclass
class Speed:
    """One way at one batch size.

    Attributes:
        model: its name.
        batch: sequences.
        way: its name.
        graphs: whether CUDA graphs are on; None for transformers.
        rates: tokens/s of all sequences together, behind the first token, one per repetition.
        limit: the same of something that does nothing but read full depth's weights and the cache.
        same: share of tokens that come before the first difference from full depth without graphs.
        left: exit layer -> share of tokens that left there; of lossless: the share of drafts
            that were accepted, if there were any.
        replays: of CUDA graphs, per token of a sequence.
        eager: share of passes through layers and heads that were not replayed; None where graphs are off.
    """

    model: str
    batch: int
    way: str
    graphs: bool | None
    rates: list[float] = field(default_factory=list)
    limit: float = 0.0
    same: float = 0.0
    left: dict[str, float] = field(default_factory=dict)
    replays: float = 0.0
    eager: float | None = None

    @property
    def name(self) -> str:
        how = {True: ", graphs", False: ", eager", None: ""}[self.graphs]
        return f"{self.way}{how}"


class AlwaysDrafting(ExitPolicy):
    """Rounds of up to `DRAFTS` drafts from the first exit, so that their passes are measured on any model."""

    def draft(self, rows: Sequence[Sequence[float]]) -> Round | None:
        exits = [k for k in range(len(self.layers)) if any(is_asked(row[k]) for row in rows)]
        return Round(exits[0], DRAFTS) if exits else None


class Ours(decoding_ways.Ours):
    """Our decoder on weights that were prepared with CUDA graphs or without.

    Args:
        model: a `MegatronGPTEarlyExitModel`.
        decoding: what `prepare_decoding` made.
        early_exit: as for `model.generate`.
        drafting: lossless rounds are taken whether a gain is expected or not.
    """

    def __init__(self, model: Any, decoding: Any, early_exit: dict | bool, drafting: bool = False):
        with generating(model):
            policy = AlwaysDrafting(prices_of(decoding), model.early_exit.layers) if drafting else None
        super().__init__(model, lambda: decoding, early_exit, policy=policy)
        self._prepared = decoding
        self.eager: float | None = None

    def __call__(self, prompts: Tokens, count: int, clock: Clock) -> Tokens:
        passes = None if self._prepared.captured is None else self._prepared.captured.passes
        before = (0, 0) if passes is None else (passes.replayed, passes.eager)
        texts = super().__call__(prompts, count, clock)
        if passes is not None:
            replayed, eager = passes.replayed - before[0], passes.eager - before[1]
            self.eager = eager / max(1, replayed + eager)
        return texts


def check(settings: "Settings", result: Result) -> None:
    """The random model."""
    effort, shape = (QUICK, random_model.TINY) if settings.quick else (FULL, random_model.LLAMA_1B)
    begin = time.monotonic()
    model = random_model.build(shape, "bf16", settings.work)
    print(f"built {shape.name} in {time.monotonic() - begin:.1f} s")
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(
        1, shape.shortlist, (16 * effort.most, effort.prompt), generator=generator
    ).tolist()
    thresholds = chosen_thresholds(model, prompts[:16], effort.new)
    measure(model, f"random, {shape.name}'s shape", prompts, thresholds, effort, result)


def chosen_thresholds(model: Any, prompts: Tokens, count: int) -> dict[int, float]:
    """Exit layer -> threshold above which the share `SHARE` of its confidences is."""
    thresholds = {}
    for n in model.early_exit.layers:
        inputs = torch.tensor(prompts), torch.tensor([len(prompt) for prompt in prompts])
        forced = {"exits": [n], "threshold": 0.0, "always": True}
        lengths = {"max_length": count, "min_length": count}
        output = model.generate(inputs, lengths, SAMPLING, early_exit=forced)["early_exit"]
        left = [pair for row in output for pair in zip(row["exit_layers"], row["confidences"], strict=True)]
        here = [confidence for layer, confidence in left if layer == n]
        thresholds[n] = min(torch.tensor(here).quantile(1 - SHARE).item(), 0.99)
    return thresholds


def measure(
    model: Any, name: str, prompts: Tokens, thresholds: dict[int, float], effort: Effort, result: Result
) -> None:
    """Adds a row and a speed per way and batch size, and what is wrong with them.

    Args:
        model: a `MegatronGPTEarlyExitModel` with exits.
        name: of the model.
        prompts: of equal length; each repetition takes the next.
        thresholds: of the exits.
        effort: how much to measure.
        result: to fill.
    """
    exits = {"exits": list(thresholds), "threshold": list(thresholds.values())}
    ways: dict[str, dict | bool] = {
        "full depth": False,
        "exits": {**exits, "always": True},
        LOSSLESS: {**exits, "lossless": True},
        DRAFTING: {**exits, "lossless": True},
    }
    device = model.gpt.output_weight().device
    bandwidth = Bandwidth(weight_bytes(model.gpt), device)
    other = HuggingFace(hugging_face.copied(model))
    with warnings_about_graphs() as warnings, counted_replays() as replays:
        most = max(BATCHES), effort.prompt + effort.new
        prepared = {graphs: tiny.prepare(model, graphs, *most) for graphs in (True, False)}
        if prepared[True].captured is not None:
            with generating(model):
                prepared[True].captured.capture_all()  # or a timed call might
        total = 0
        for batch in BATCHES:
            runs: list[tuple[Speed, Callable]] = [
                (Speed(name, batch, way, graphs), Ours(model, prepared[graphs], early_exit, way == DRAFTING))
                for way, early_exit in ways.items()
                for graphs in (True, False)
            ]
            runs.append((Speed(name, batch, TRANSFORMERS, None), other))
            bandwidth.read()
            texts = repeat(runs, prompts, batch, effort, replays)
            length = effort.prompt + effort.new // 2
            moved = weight_bytes(model.gpt) + batch * cache_bytes(model.gpt, length)
            for speed, _ in runs:
                speed.limit = batch * bandwidth.medians()["copy"] / moved
            judge([speed for speed, _ in runs], texts, result)
            total += round(sum(speed.replays * effort.new for speed, _ in runs))
    result.lines.append(
        (f"{name}: copying", f"{bandwidth.medians()['copy'] / 1e9:.0f} GB/s, read and written")
    )
    check_graphs(total, warnings, result)


def repeat(
    runs: Sequence[tuple[Speed, Callable]], prompts: Tokens, batch: int, effort: Effort, replays: Counter
) -> dict[str, Tokens]:
    """Runs all ways in turn, once to warm up; fills their rates. Returns each way's last texts."""
    texts: dict[str, Tokens] = {}
    begin = time.monotonic()
    for round_ in range(-1, effort.most):
        if round_ >= effort.fewest and time.monotonic() - begin > effort.seconds:
            break
        first = max(round_, 0) * batch
        mine = prompts[first : first + batch]
        for speed, generate in random.Random(round_).sample(list(runs), len(runs)):
            replays.clear()
            clock = Clock()
            texts[speed.name] = generate(mine, effort.new, clock)
            seconds = clock.seconds()
            short = [len(text) for text in texts[speed.name] if len(text) != effort.new]
            if short or not clock.first_tokens:
                raise RuntimeError(
                    f"{speed.name}, batch {batch}: a text has {short[:1]} tokens, not {effort.new}"
                )
            if round_ < 0:
                begin = time.monotonic()  # warming up, with its captures, is not counted
                continue
            speed.rates.append(batch * (effort.new - clock.first_tokens) / (seconds - clock.first))
            speed.replays = replays["replays"] / effort.new
            if isinstance(generate, Ours):
                speed.left, speed.eager = shares(speed, generate.sequences), generate.eager
    return texts


def shares(speed: Speed, sequences: Sequence[Any]) -> dict[str, float]:
    """See `Speed.left`."""
    if speed.way in (LOSSLESS, DRAFTING):
        drafts = sum(each.statistics.drafts for each in sequences)
        return {"accepted": sum(each.statistics.accepted for each in sequences) / drafts} if drafts else {}
    layers = Counter(layer for each in sequences for layer in each.exit_layers)
    return {str(n): count / layers.total() for n, count in sorted(layers.items())}


def judge(speeds: Sequence[Speed], texts: dict[str, Tokens], result: Result) -> None:
    """Adds the rows of one batch size."""
    by_name = {speed.name: speed for speed in speeds}
    plain, theirs = texts["full depth, eager"], spread(by_name[TRANSFORMERS].rates).median
    for speed in speeds:
        speed.same = same_share(texts[speed.name], plain)
        s = spread(speed.rates)
        found = f"{s.median:.0f} tokens/s ({s.q25:.0f}-{s.q75:.0f}), {s.median / theirs:.2f} x transformers, "
        found += f"{s.median / speed.limit:.0%} of the limit, {speed.same:.0%} of full depth's text"
        found += "" if speed.eager is None else f", {speed.eager:.1%} of passes without graphs"
        what, fault = f"{speed.model}, batch {speed.batch}: {speed.name}", ""
        if speed.graphs and not speed.replays:
            fault = "no CUDA graph was replayed"
        elif speed.graphs is False and speed.replays:
            fault = "CUDA graphs were replayed, though they are off"
        elif speed.way == TRANSFORMERS:
            starts = sum(a[0] == b[0] for a, b in zip(texts[speed.name], plain, strict=True))
            if len(plain) > 1 and starts < SAME_START * len(plain):
                fault = f"{starts} of {len(plain)} texts begin as ours do: the weights are not the same"
        result.expect(not fault, what, found, fault)
        result.speeds.append({**asdict(speed), "name": speed.name})


def same_share(texts: Tokens, plain: Tokens) -> float:
    """Of all tokens, those before a text's first difference."""
    same = 0
    for mine, other in zip(texts, plain, strict=True):
        same += next((k for k, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), len(mine))
    return same / sum(map(len, plain))
