# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Greedy generation over thresholds: where tokens leave, what that costs in quality, what it saves."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_ee.data.index_file import open_indexed_file
from nemo_ee.errors import ConfigError, DataError, Fault, GenerationError
from nemo_ee.evaluation.exit_thresholds import resolved_thresholds
from nemo_ee.evaluation.held_out import HeldOutQuality, quality_of
from nemo_ee.evaluation.scored_model import Score, score_with
from nemo_ee.evaluation.settings import HeldOutConfig, SweepConfig, Threshold
from nemo_ee.evaluation.teacher_forced import CONFIDENCE_RULE, TextScores, score_final
from nemo_ee.generation.generating import generating
from nemo_ee.report.schema import Interval, Sample, Spread, ThresholdResult
from nemo_ee.report.statistics import bootstrap_mean, spread
from nemo_ee.running.display import token_pieces

FULL_DEPTH: None = None
"""Stands for no threshold."""
BATCH = 8


@dataclass(frozen=True)
class GeneratedText:
    """A prompt's token ids, and the tokens generated after it with their exits."""

    prompt: list[int]
    tokens: list[int]
    exit_layers: list[int]
    confidences: list[float]


def document_prompts(data: HeldOutConfig, count: int, tokens: int) -> list[list[int]]:
    """The first tokens of evenly spaced documents.

    Raises:
        DataError: no document is longer than that.
    """
    file = open_indexed_file(data.prefix)
    ends = np.cumsum(file.sequence_lengths, dtype=np.int64)
    starts = (ends - file.sequence_lengths)[file.sequence_lengths > tokens]
    if not len(starts):
        raise DataError(
            f"generation.prompt_tokens={tokens}: no document of data.prefix={data.prefix} is longer; "
            "use fewer"
        )
    ids, count = file.token_ids(), min(count, len(starts))
    chosen = [int(starts[len(starts) * index // count]) for index in range(count)]
    return [ids[start : start + tokens].tolist() for start in chosen]


class Sweep:
    """Runs one model over all thresholds.

    Args:
        model: a `MegatronGPTEarlyExitModel`.
        prompts: token ids.
        settings: of the sweep.
        seed: of the bootstrap over prompts.
        advance: called after every generation.
        names: of the prompts, for people; None: their text.

    Attributes:
        quality: of every exit on full depth's texts, once `run` has come to its end.
    """

    quality: HeldOutQuality

    def __init__(
        self,
        model: Any,
        prompts: Sequence[list[int]],
        settings: SweepConfig,
        seed: int,
        advance: Callable[[], Any] = lambda: None,
        names: Sequence[str] | None = None,
    ):
        self.model, self.prompts, self.settings, self.seed = model, list(prompts), settings, seed
        self.advance, self.names = advance, names
        self.exits = settings.exits or model.early_exit.layers
        faults: list[Fault] = []
        self.thresholds = resolved_thresholds(settings, model.early_exit, faults)
        if faults:
            raise ConfigError(*faults)
        self.final_layer = model.cfg.num_layers
        self.texts: dict[Threshold | None, list[GeneratedText]] = {}

    @staticmethod
    def generations(settings: SweepConfig, prompts: int) -> int:
        """How often `advance` is called."""
        ways = 1 + len(settings.thresholds)
        return ways * (-(-prompts // BATCH) + min(prompts, settings.timed_prompts) * settings.repeats)

    def run(self) -> tuple[ThresholdResult, ...]:
        """Generates, judges and times.

        Raises:
            GenerationError: a prompt is too long, or nothing that could leave early was generated.
        """
        ways = [FULL_DEPTH, *self.thresholds]
        for threshold in ways:
            self.texts[threshold] = []
            for first in range(0, len(self.prompts), BATCH):
                self.texts[threshold] += self.generate(self.prompts[first : first + BATCH], threshold)
                self.advance()
        speeds = self._time(ways)
        full = self.texts[FULL_DEPTH]
        if not any(len(text.tokens) > 1 for text in full):
            raise GenerationError(
                "generation: every text ends after one token at full depth; give other prompts"
            )
        scores = self.score(full)
        self.quality = quality_of(((each, mask) for each, _, mask in scores), self.seed)
        perplexity = self.perplexity(full)
        return tuple(self._result(threshold, scores, perplexity, speeds) for threshold in self.thresholds)

    def generate(self, prompts: Sequence[list[int]], threshold: Threshold | None) -> list[GeneratedText]:
        """One call of the model's `generate`, greedy, until EOS. Exits are asked for every token, so that the text is a
        matter of thresholds alone."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        early_exit: dict | bool = False
        if threshold is not None:  # by the rule that text is scored by, whatever the checkpoint's is
            values = list(self.thresholds[threshold].values)
            early_exit = {"threshold": values, "exits": list(self.exits), "always": True}
            early_exit["confidence"] = CONFIDENCE_RULE
        output = self.model.generate(
            (ids, lengths),
            {"max_length": self.settings.tokens_to_generate, "min_length": 0},
            {"use_greedy": True, "end_strings": ["<|endoftext|>"]},
            early_exit=early_exit,
        )
        return [
            GeneratedText(list(prompt), all_ids[len(prompt) :], each["exit_layers"], each["confidences"])
            for prompt, all_ids, each in zip(prompts, output["token_ids"], output["early_exit"], strict=True)
        ]

    def _time(self, ways: list[Threshold | None]) -> dict[Threshold | None, list[float]]:
        """Tokens per second, prompt included, of each way and repetition.

        Within a repetition all ways run on one prompt before the next prompt, starting with another way each
        time, so that drifts of the machine's speed meet all alike.
        """
        prompts = self.prompts[: self.settings.timed_prompts]
        speeds: dict[Threshold | None, list[float]] = {way: [] for way in ways}
        for repeat in range(self.settings.repeats):
            seconds, tokens = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0)
            for index, prompt in enumerate(prompts):
                shift = (repeat * len(prompts) + index) % len(ways)
                for way in ways[shift:] + ways[:shift]:
                    _synchronise()
                    start = time.perf_counter()
                    (text,) = self.generate([prompt], way)
                    _synchronise()
                    seconds[way] += time.perf_counter() - start
                    tokens[way] += len(text.tokens)
                    self.advance()
            for way in ways:
                speeds[way].append(tokens[way] / seconds[way])
        return speeds

    def _batch(self, texts: Sequence[GeneratedText]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and labels [B, S], padded, and which labels were generated, [B, S]."""
        whole = [text.prompt + text.tokens for text in texts]
        width = max(map(len, whole))
        device = self.model.gpt.output_weight().device
        ids = torch.zeros(len(texts), width, dtype=torch.long, device=device)
        mask = torch.zeros(len(texts), width - 1, dtype=torch.bool, device=device)
        for row, (text, tokens) in enumerate(zip(texts, whole, strict=True)):
            ids[row, : len(tokens)] = torch.tensor(tokens, device=device)
            mask[row, len(text.prompt) - 1 : len(tokens) - 1] = True
        return ids[:, :-1], ids[:, 1:], mask

    def score(self, texts: Sequence[GeneratedText]) -> list[tuple[TextScores, Tensor, Tensor]]:
        """Of batches of full depth's texts: all exits, the labels, and where a token could leave, [B, S] each."""
        score = score_with(self.model)
        return [self._score(texts[i : i + BATCH], score) for i in range(0, len(texts), BATCH)]

    def _score(self, texts: Sequence[GeneratedText], score: Score) -> tuple[TextScores, Tensor, Tensor]:
        tokens, labels, mask = self._batch(texts)
        scores = score(tokens, labels)
        for row, text in enumerate(texts):
            mask[row, len(text.prompt) - 1] = False
        return scores, labels, mask

    def perplexity(self, texts: Sequence[GeneratedText]) -> float:
        """The full model's, of generated tokens."""
        loss, count = 0.0, 0
        for first in range(0, len(texts), BATCH):
            tokens, labels, mask = self._batch(texts[first : first + BATCH])
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            with generating(self.model):
                states = self.model.gpt.forward_states(tokens, positions, None)
                scores = score_final(self.model.gpt, states.output, labels)
            loss += scores.losses[mask].double().sum().item()
            count += int(mask.sum())
        return math.exp(loss / count)

    def _result(
        self,
        threshold: Threshold,
        scores: Sequence[tuple[TextScores, Tensor, Tensor]],
        full_depth_perplexity: float,
        speeds: dict[Threshold | None, list[float]],
    ) -> ThresholdResult:
        agreement, interval = self.agreement(self.thresholds[threshold].values, scores)
        texts = self.texts[threshold]
        left = [layer for text in texts for layer in text.exit_layers]
        full: list[float] = speeds[FULL_DEPTH]
        return ThresholdResult(
            name=self.thresholds[threshold].name,
            thresholds=self.thresholds[threshold].values,
            tokens=len(left),
            share_per_exit={n: left.count(n) / len(left) for n in (*self.exits, self.final_layer)},
            agreement=agreement,
            perplexity=self.perplexity(texts),
            full_depth_perplexity=full_depth_perplexity,
            tokens_per_second=spread(speeds[threshold]),
            full_depth_tokens_per_second=spread(full),
            speedup=_ratio(speeds[threshold], full),
            agreement_ci=interval,
        )

    def agreement(
        self, thresholds: Sequence[float], scores: Sequence[tuple[TextScores, Tensor, Tensor]]
    ) -> tuple[float, Interval | None]:
        """Share of full depth's tokens that decoding with these thresholds, one per exit in use, would give, with its
        interval over prompts."""
        agreements: list[float] = []
        counts: list[float] = []
        for text_scores, labels, mask in scores:
            tokens, layers = text_scores.leaving(dict(zip(self.exits, thresholds, strict=True)))
            # The final exit's token is the label but for rounding between decoding and this pass.
            equal = ((tokens == labels) | (layers == 0)) & mask
            agreements += equal.sum(1).double().tolist()
            counts += mask.sum(1).double().tolist()
        return bootstrap_mean(agreements, counts, seed=self.seed)

    def samples(self) -> tuple[Sample, ...]:
        """The first texts at `sample_threshold`."""
        settings, tokenizer = self.settings, self.model.text_tokenizer
        if not settings.samples:
            return ()
        names = self.names or [tokenizer.decode(prompt) for prompt in self.prompts[: settings.samples]]
        return tuple(
            Sample(
                name,
                self.thresholds[settings.sample_threshold].name,
                tuple(token_pieces(text.tokens, tokenizer)),
                tuple(text.exit_layers),
                tuple(text.confidences),
            )
            for name, text in zip(
                names[: settings.samples], self.texts[settings.sample_threshold], strict=False
            )
        )


def _ratio(one: Sequence[float], other: Sequence[float]) -> Spread:
    return spread([a / b for a, b in zip(one, other, strict=True)])


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
