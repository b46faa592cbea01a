# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""`model.early_exit`: read once, validated as a whole, kept as a frozen `EarlyExitConfig`.

The dataclasses below are the schema: their fields are the YAML keys, their docstrings the documentation,
their defaults the defaults. Nothing else in nemo_ee reads the raw configuration.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from nemo_ee.errors import ConfigError, Fault
from nemo_ee.head_config import HeadConfig, head_faults, heads_in_words
from nemo_ee.schema import build_config, choice, holds, is_number

ABOVE_0 = holds(lambda value: value > 0, "must be positive", "use e.g. 0.01")
TOKENS = holds(lambda tokens: tokens >= 1, "must be positive", "use e.g. 40960")
RATE = holds(lambda rate: 0 <= rate < 1, "a rate of dropped layers lies within [0, 1)", "use e.g. 0.1")
RATIO = holds(lambda ratio: ratio > 0, "a ratio of times is positive", "use e.g. 2.0")
FACTOR = holds(lambda factor: factor >= 0, "a loss weight would be negative", "use 0 or more")
PERIOD = holds(lambda steps: steps >= 1, "must be positive", "use null")
Weight = Annotated[float, holds(lambda weight: weight >= 0, "must not be negative", "use 0 or more")]
TokenWeighting = Annotated[str, choice("none", "confidence")]
Chunk = Annotated[int | None, holds(lambda tokens: tokens >= 1, "must be positive", "use e.g. 256")]


@dataclass(frozen=True)
class RidgeConfig:
    """Closed-form fit of the translator: ridge regression from the exit's state to the final normed state.

    Attributes:
        tokens: tuning tokens that the fit reads (rounded up to whole micro-batches of all ranks); null: 40960, or
            ten for each feature (hidden size, and the MLP's width) if that is more: 184,320 at 8B parameters.
        penalty: ridge penalty, relative to the mean diagonal of X'X.
    """

    tokens: Annotated[int | None, TOKENS] = None
    penalty: Annotated[float, ABOVE_0] = 0.01

    def tokens_for(self, features: int) -> int:
        """`tokens`, or how many a fit of so many features reads by default."""
        return max(40960, 10 * features) if self.tokens is None else self.tokens


@dataclass(frozen=True)
class ExitObjective:
    """What one exit minimises, in tuning and in pre-training: a weighted sum of cross-entropies and a divergence.

    Attributes:
        ce_weight: weight of cross-entropy against the text.
        kl_weight: weight of the divergence from the final exit, KL(final || exit).
        argmax_weight: weight of cross-entropy against the final exit's most probable token.
        token_weighting: `none`, or `confidence`: each token's loss is multiplied by the exit's own detached
            confidence (EE-Tuning's dynamic token-wise weights, arXiv:2402.00518 section 3).
        loss_chunk_tokens: tokens whose logits exist at one time, per exit; null: as many as need 128 MiB per
            rank, which depends on the vocabulary and on tensor parallelism.
    """

    ce_weight: Weight = 1.0
    kl_weight: Weight = 0.0
    argmax_weight: Weight = 0.0
    token_weighting: TokenWeighting = "none"
    loss_chunk_tokens: Chunk = 1024

    @property
    def distils(self) -> bool:
        """Whether the final exit is part of the objective."""
        return self.kl_weight > 0 or self.argmax_weight > 0


@dataclass(frozen=True)
class TuningConfig(ExitObjective):
    """EE-Tuning's objective, summed over exits. With `kl_weight` and `argmax_weight` at 0 nothing above the last
    exit is built, unless `init` needs it.

    Attributes:
        loss_weights: one non-negative weight per exit layer; null means 1.0 for each.
    """

    loss_weights: tuple[Weight, ...] | None = None
    ce_weight: Weight = 0.0
    kl_weight: Weight = 0.5
    argmax_weight: Weight = 0.5
    loss_chunk_tokens: Chunk = 256


@dataclass(frozen=True)
class LayerDropoutConfig:
    """LayerSkip's stochastic depth (arXiv:2404.16710 section 4.1): a sample skips layer l at a rate that grows
    with depth as 2^((l - 1)/(L - 1)) - 1, from 0 at the first layer to `max_rate` at the last.

    Attributes:
        max_rate: of the last layer; 0 turns it off.
        schedule: `constant`, or `exponential`: the rates grow with the step s as 2^(s/steps) - 1.
        steps: of the `exponential` schedule.
    """

    max_rate: Annotated[float, RATE] = 0.0
    schedule: Annotated[str, choice("constant", "exponential")] = "constant"
    steps: int = 0


@dataclass(frozen=True)
class BubbleFillingConfig:
    """Extra micro-batches in the idle time of a pipeline (arXiv:2312.04916 section 3.3): they train the first
    stages during its warm-up and the last stages during its cool-down.

    Attributes:
        warmup: fill the bubbles between a stage's first forward passes and its first backward pass.
        cooldown: fill the bubbles after the stages' last full micro-batches.
        backward_ratio: time of a stage's backward pass relative to its forward pass; 2 without recomputation
            of activations, 3 with full recomputation.
    """

    warmup: bool = False
    cooldown: bool = False
    backward_ratio: Annotated[float, RATIO] = 2.0

    @property
    def enabled(self) -> bool:
        """Whether there is anything to fill."""
        return self.warmup or self.cooldown


@dataclass(frozen=True)
class TrainingConfig:
    """Pre-training's objective: the final exit's cross-entropy plus a weighted sum of the exits'.

    The weight of exit i in step t is loss_weights[i] x factor(t) x curriculum(i, t).

    Attributes:
        loss_weights: one non-negative weight per exit layer; null means depth: layer / num_layers.
        schedule: how factor(t) goes from `initial_factor` to 1: `constant` (1 always), `linear` or `cosine`.
        initial_factor: factor(0); below 1 warms the exits' losses up, above 1 cools them down.
        schedule_steps: steps until the factor is 1.
        curriculum: `none`; `rotational`: in step t the exits number t, t + period, … take part (numbered from
            0, modulo period); `gradual`: exits join from the deepest to the shallowest, evenly over
            `curriculum_steps` (both LayerSkip's, arXiv:2404.16710 section 4.2).
        curriculum_period: of `rotational`; null: the number of exits, i.e. one exit per step.
        curriculum_steps: of `gradual`: the step in which the last exit has joined.
        token_weighting: as in tuning.
        loss_chunk_tokens: as in tuning.
        pre_exit: an exit on the last layer of a pipeline stage is computed by the next stage, which relieves
            the first one.
        layer_dropout: LayerSkip's.
        bubble_filling: extra micro-batches in pipeline bubbles.
    """

    loss_weights: tuple[Weight, ...] | None = None
    schedule: Annotated[str, choice("constant", "linear", "cosine")] = "constant"
    initial_factor: Annotated[float, FACTOR] = 0.0
    schedule_steps: int = 0
    curriculum: Annotated[str, choice("none", "rotational", "gradual")] = "none"
    curriculum_period: Annotated[int | None, PERIOD] = None
    curriculum_steps: int = 0
    token_weighting: TokenWeighting = "none"
    loss_chunk_tokens: Chunk = 1024
    pre_exit: bool = False
    layer_dropout: LayerDropoutConfig = field(default_factory=LayerDropoutConfig)
    bubble_filling: BubbleFillingConfig = field(default_factory=BubbleFillingConfig)

    @property
    def objective(self) -> ExitObjective:
        """What each exit minimises: cross-entropy against the text."""
        return ExitObjective(token_weighting=self.token_weighting, loss_chunk_tokens=self.loss_chunk_tokens)


BEFORE_CALIBRATION = 0.8
"""A threshold, as one number for all exits, that configurations had by default and that training wrote into every
checkpoint. Calibration writes a list."""


@dataclass(frozen=True)
class InferenceConfig:
    """Defaults for generation; each request may override them.

    Attributes:
        threshold: leave at an exit whose confidence is strictly above it. One number, or one per exit layer.
            1.0 never exits. null: none is known yet, and exits are not used by themselves; calibration writes one
            per exit. `BEFORE_CALIBRATION` counts as null.
        exits: the exit layers in use; null means all.
        confidence: the rule by which exits are sure, one of `nemo_ee.decoding.confidence_rules`.
    """

    threshold: float | tuple[float, ...] | None = None
    exits: tuple[int, ...] | None = None
    confidence: str = "max_probability"

    @property
    def known_threshold(self) -> float | tuple[float, ...] | None:
        """The threshold, if anybody has chosen one."""
        return None if self.threshold == BEFORE_CALIBRATION else self.threshold


@dataclass(frozen=True)
class EarlyExitConfig:
    """`model.early_exit`.

    Attributes:
        layers: exit layers, 1-based: an exit at n reads the output of transformer layer n.
        head: the modules of every exit, or a list with those of each, in the order of `layers`.
        init: `ridge` (closed form), `copy` (from the backbone's own modules; an MLP beside a translator adds
            nothing at first) or `random`.
        ridge: settings of the closed form.
        tuning: the tuning objective.
        training: the objective of pre-training.
        inference: defaults for generation.
    """

    layers: tuple[int, ...]
    head: tuple[HeadConfig, ...] | HeadConfig = field(default_factory=HeadConfig)
    init: Annotated[str, choice("ridge", "copy", "random")] = "ridge"
    ridge: RidgeConfig = field(default_factory=RidgeConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)

    @property
    def needs_final_exit(self) -> bool:
        """Whether tuning needs the final exit's state, i.e. the whole depth of the backbone."""
        return self.tuning.distils or self.init == "ridge"

    @property
    def heads(self) -> dict[int, HeadConfig]:
        """Exit layer -> its modules."""
        each = self.head if isinstance(self.head, tuple) else [self.head] * len(self.layers)
        return dict(zip(self.layers, each, strict=True))

    def loss_weight(self, layer: int) -> float:
        """The weight of the exit at `layer` in the objective."""
        weights = self.tuning.loss_weights
        return 1.0 if weights is None else weights[self.layers.index(layer)]

    def to_dict(self) -> dict:
        """Plain containers, as stored in a checkpoint's configuration."""
        return _plain(dataclasses.asdict(self))


def parse_early_exit(
    raw: Mapping, num_layers: int, vocab_size: int | None = None, key: str = "model.early_exit"
) -> EarlyExitConfig:
    """Turns the YAML section into a validated `EarlyExitConfig`.

    Args:
        raw: plain containers (resolve OmegaConf first).
        num_layers: the backbone's number of transformer layers.
        vocab_size: the tokenizer's vocabulary size, if known; bounds `head.shortlist_size`.
        key: dotted name of the section, for messages.

    Raises:
        ConfigError: listing every fault: unknown keys (with the nearest known one), wrong types, and values
            that break a rule.
    """
    faults: list[Fault] = []
    if isinstance(raw, Mapping):
        raw = {**raw, "head": heads_in_words(raw.get("head"))}
    config = build_config(EarlyExitConfig, raw, key, faults)
    if config is not None:
        faults = _check_layers(config, num_layers, key) + faults
        faults += head_faults(config.head, config.layers, config.init, vocab_size, key)
        faults += _check_tuning(config, key)
        faults += _check_training(config, key)
        faults += _check_inference(config, key)
    if faults:
        raise ConfigError(*faults)
    return config


def check_thresholds(threshold, exits: int, key: str) -> list[Fault]:
    """Faults of a threshold: one number or one per exit in use, each within [0, 1]."""
    values = threshold if isinstance(threshold, list | tuple) else (threshold,)
    faults = []
    if isinstance(threshold, list | tuple) and len(values) != exits:
        rule = f"{len(values)} thresholds for {exits} exits"
        faults.append(Fault(key, list(values), rule, "give one per exit, or one number"))
    if not all(is_number(v) and 0.0 <= v <= 1.0 for v in values):
        rule = "a confidence threshold lies within [0, 1]"
        faults.append(Fault(key, threshold, rule, "use e.g. 0.8; 1.0 never exits"))
    return faults


def _check_layers(config: EarlyExitConfig, num_layers: int, key: str) -> list[Fault]:
    key, layers = f"{key}.layers", list(config.layers)
    if not layers:
        return [Fault(key, layers, "at least one exit layer is needed", f"name layers from 1..{num_layers}")]
    faults = []
    outside = [n for n in layers if not 1 <= n <= num_layers]
    if outside:
        rule = f"{outside} not within 1..model.num_layers={num_layers}"
        faults.append(Fault(key, layers, rule, f"use 1..{num_layers}"))
    if len(set(layers)) != len(layers):
        faults.append(Fault(key, layers, "an exit layer is named twice", "name each layer once"))
    elif layers != sorted(layers):
        faults.append(Fault(key, layers, "exit layers must ascend", f"write {sorted(layers)}"))
    return faults


def _check_tuning(config: EarlyExitConfig, key: str) -> list[Fault]:
    tuning, key = config.tuning, f"{key}.tuning"
    weights = tuning.loss_weights
    faults = _check_weights(weights, config.layers, key)
    if weights and not faults and not any(weights):
        remedy = "give at least one exit a weight above 0"
        faults.append(Fault(f"{key}.loss_weights", list(weights), "no exit would be tuned", remedy))
    if tuning.ce_weight == 0 and not tuning.distils:
        rule = "with kl_weight=0 and argmax_weight=0 too there is no objective"
        faults.append(Fault(f"{key}.ce_weight", 0, rule, "set ce_weight or kl_weight above 0"))
    return faults


def _check_weights(weights: tuple[float, ...] | None, layers: tuple[int, ...], key: str) -> list[Fault]:
    if weights is None or len(weights) == len(layers):
        return []
    rule = f"{len(weights)} weights for {len(layers)} exit layers"
    return [Fault(f"{key}.loss_weights", list(weights), rule, "give one per exit layer, or null")]


def _check_training(config: EarlyExitConfig, key: str) -> list[Fault]:
    training, key = config.training, f"{key}.training"
    dropout = training.layer_dropout
    faults = _check_weights(training.loss_weights, config.layers, key)
    for name, steps, schedule in (
        ("schedule_steps", training.schedule_steps, training.schedule),
        ("curriculum_steps", training.curriculum_steps, training.curriculum),
        ("layer_dropout.steps", dropout.steps, dropout.schedule),
    ):
        if schedule in ("linear", "cosine", "gradual", "exponential") and steps < 1:
            rule = f"must be positive for {schedule}"
            faults.append(Fault(f"{key}.{name}", steps, rule, "give the number of steps"))
    return faults


def _check_inference(config: EarlyExitConfig, key: str) -> list[Fault]:
    exits, faults, name = config.inference.exits, [], f"{key}.inference.exits"
    if exits is not None and not set(exits) <= set(config.layers):
        rule = f"not all of {list(config.layers)}"
        faults.append(Fault(name, list(exits), rule, "name exit layers that exist, or null"))
    if exits is not None and list(exits) != sorted(set(exits)):
        rule = "exits must ascend, each named once"
        faults.append(Fault(name, list(exits), rule, f"write {sorted(set(exits))}"))
    count = len(config.layers if exits is None else exits)
    if config.inference.threshold is None:
        return faults
    return faults + check_thresholds(config.inference.threshold, count, f"{key}.inference.threshold")


def _plain(value):
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
