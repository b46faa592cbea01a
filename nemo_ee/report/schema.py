# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What an evaluation measures, as frozen records that go to and from ``report.json``.

Units: losses in nats per token, agreement and confidence as shares from 0 to 1, speed in generated tokens
per second.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

VERSION = 3
"""Of the JSON layout; raised when a field comes, goes away or changes its meaning."""


@dataclass(frozen=True)
class Interval:
    """A confidence interval.

    Attributes:
        low: lower bound.
        high: upper bound.
    """

    low: float
    high: float


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity.

    Attributes:
        median: of the repetitions.
        q25: lower quartile.
        q75: upper quartile.
    """

    median: float
    q25: float
    q75: float


@dataclass(frozen=True)
class Metadata:
    """Where the numbers come from.

    Attributes:
        model: the base checkpoint.
        num_layers: transformer layers of the base; the final exit counts as an exit at this layer.
        adapter: the exits-only checkpoint, if the exits are not part of the model.
        commit: of the code that measured.
        device: processor or accelerator, with the number of threads or devices.
        torch_version: as torch reports it.
        dtype: of weights and activations.
        seed: of sampling and of the bootstrap.
        date: UTC, ISO 8601.
        command: the command line that reproduces the report.
    """

    model: str
    num_layers: int
    adapter: str | None
    commit: str
    device: str
    torch_version: str
    dtype: str
    seed: int
    date: str
    command: str


@dataclass(frozen=True)
class ExitQuality:
    """One exit on held-out text, teacher-forced, as if every token left there.

    Attributes:
        layer: 1-based exit layer.
        loss: cross-entropy against the text.
        agreement: share of positions where the most probable token that the exit can emit equals the final
            exit's argmax. A shortlist's bucket is never emitted.
        mean_confidence: mean of the largest probability.
        tokens: positions measured.
        loss_ci: 95 % interval of the loss over sequences, None if there was only one sequence.
        agreement_ci: likewise of the agreement.
        strict_agreement: the agreement if positions where the bucket is most probable count as disagreement,
            None if it was not measured.
    """

    layer: int
    loss: float
    agreement: float
    mean_confidence: float
    tokens: int
    loss_ci: Interval | None = None
    agreement_ci: Interval | None = None
    strict_agreement: float | None = None


@dataclass(frozen=True)
class ThresholdResult:
    """Generation with given thresholds, measured alternately with full depth in the same run.

    Attributes:
        name: of the thresholds, for people.
        thresholds: one per exit in use, confidences above which a token leaves; 1.0 does not ask.
        tokens: generated tokens.
        share_per_exit: exit layer to its share of the generated tokens; the final exit is the last layer.
            Sums to 1.
        agreement: share of tokens that equal full depth's, teacher-forced on full depth's continuation. Each
            text's first token, which never leaves early, does not count.
        perplexity: of the generated text, under the full model.
        full_depth_perplexity: likewise of full depth's own text.
        tokens_per_second: with early exit.
        full_depth_tokens_per_second: without.
        speedup: the ratio of the two, repetition by repetition.
        agreement_ci: 95 % interval over prompts, None if there was only one.
    """

    name: str
    thresholds: tuple[float, ...]
    tokens: int
    share_per_exit: Mapping[int, float]
    agreement: float
    perplexity: float
    full_depth_perplexity: float
    tokens_per_second: Spread
    full_depth_tokens_per_second: Spread
    speedup: Spread
    agreement_ci: Interval | None = None

    def __post_init__(self):
        total = sum(self.share_per_exit.values())
        assert abs(total - 1.0) < 1e-6, f"shares per exit at threshold {self.name} sum to {total}"

    @property
    def is_one_number(self) -> bool:
        """Whether it is one threshold for all exits."""
        return self.name == f"{self.thresholds[0]:g}"


@dataclass(frozen=True)
class CurvePoint:
    """One exit at one validation during tuning.

    Attributes:
        step: optimizer steps so far.
        layer: 1-based exit layer; None is the final exit, which tuning does not change.
        loss: held-out cross-entropy.
        tokens: tuning tokens seen so far, None if it was not logged.
        agreement: with the final exit, None if it was not logged.
        confidence: mean of the largest probability, None if it was not logged.
    """

    step: int
    layer: int | None
    loss: float
    tokens: int | None = None
    agreement: float | None = None
    confidence: float | None = None


@dataclass(frozen=True)
class Sample:
    """One generated text, token by token.

    Attributes:
        prompt: what was continued.
        threshold: name of the thresholds, see `ThresholdResult`.
        tokens: text of each generated token.
        exit_layers: the 1-based layer each token left at; the last layer is the final exit.
        confidences: of each token at its exit.
    """

    prompt: str
    threshold: str
    tokens: tuple[str, ...]
    exit_layers: tuple[int, ...]
    confidences: tuple[float, ...]

    def __post_init__(self):
        lengths = {len(self.tokens), len(self.exit_layers), len(self.confidences)}
        assert len(lengths) == 1, (
            f"a sample needs one exit layer and confidence per token, got lengths {lengths}"
        )


@dataclass(frozen=True)
class Report:
    """An evaluation of a model with early exits.

    Attributes:
        metadata: where the numbers come from.
        exits: the early exits in ascending order; the final exit is not among them.
        final_loss: of the final exit on the same held-out text.
        final_loss_ci: its 95 % interval, None if there was only one sequence.
        thresholds: results in the order that was asked for.
        tuning_curve: validations during tuning, empty if unknown.
        samples: generated texts.
        prompts: what was generated after, in words.
        exits_on_own_text: the early exits on what full depth generated after the prompts, as if every token left there;
            each text's first token does not count. Empty without thresholds.
        version: of the layout.
    """

    metadata: Metadata
    exits: tuple[ExitQuality, ...]
    final_loss: float
    final_loss_ci: Interval | None = None
    thresholds: tuple[ThresholdResult, ...] = ()
    tuning_curve: tuple[CurvePoint, ...] = ()
    samples: tuple[Sample, ...] = ()
    prompts: str = ""
    exits_on_own_text: tuple[ExitQuality, ...] = ()
    version: int = field(default=VERSION)

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers at which a token can leave, the last one included, ascending."""
        layers = {exit_.layer for exit_ in self.exits}
        layers.update(layer for result in self.thresholds for layer in result.share_per_exit)
        layers.update(layer for sample in self.samples for layer in sample.exit_layers)
        return tuple(sorted(layers | {self.metadata.num_layers}))
