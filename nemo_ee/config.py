# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""`model.early_exit`: read once, validated as a whole, kept as a frozen `EarlyExitConfig`.

The dataclasses below are the schema: their fields are the YAML keys, their docstrings the documentation,
their defaults the defaults. Nothing else in nemo_ee reads the raw configuration.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field

from nemo_ee.errors import ConfigError, Fault

PROJECTIONS = ("tied", "untied", "shortlist")
INITIALISATIONS = ("ridge", "copy", "random")
TOKEN_WEIGHTINGS = ("none", "confidence")


@dataclass(frozen=True)
class HeadConfig:
    """What stands between an exit layer's hidden state and its logits, in the order in which it is applied.

    Attributes:
        block: a full transformer layer (attention and MLP) of the backbone's kind, with its own KV cache.
        mlp: an MLP of the backbone's kind with a norm of its own: a residual step before `norm`, or beside
            the translator where there is one.
        norm: a norm of the backbone's kind, with its own gain.
        linear: a linear translator [H] -> [H] with bias. The closed-form (`ridge`) initialisation fits it.
        projection: to the vocabulary: `tied` shares the backbone's output weight, `untied` has its own,
            `shortlist` has rows for the `shortlist_size` most frequent tokens of the tuning text and one
            bucket for all others.
        shortlist_size: tokens kept by a `shortlist` projection.
        train_projection: tune the projection's weight. A tied projection belongs to the backbone: never.
    """

    block: bool = False
    mlp: bool = True
    norm: bool = True
    linear: bool = True
    projection: str = "shortlist"
    shortlist_size: int = 8192
    train_projection: bool = False


@dataclass(frozen=True)
class RidgeConfig:
    """Closed-form fit of the translator: ridge regression from the exit's state to the final normed state.

    Attributes:
        tokens: tuning tokens that the fit reads (rounded up to whole global batches).
        penalty: ridge penalty, relative to the mean diagonal of X'X.
    """

    tokens: int = 40960
    penalty: float = 0.01


@dataclass(frozen=True)
class TuningConfig:
    """EE-Tuning's objective: per exit a weighted sum of cross-entropies and a divergence, summed over exits.

    Attributes:
        loss_weights: one non-negative weight per exit layer; null means 1.0 for each.
        ce_weight: weight of cross-entropy against the text.
        kl_weight: weight of the divergence from the final exit, KL(final || exit).
        argmax_weight: weight of cross-entropy against the final exit's most probable token. With this and
            `kl_weight` at 0 nothing above the last exit is built, unless `init` needs it.
        token_weighting: `none`, or `confidence`: each token's loss is multiplied by the exit's own detached
            confidence (EE-Tuning's dynamic token-wise weights, arXiv:2402.00518 section 3).
        loss_chunk_tokens: tokens whose logits exist at one time, per exit.
    """

    loss_weights: tuple[float, ...] | None = None
    ce_weight: float = 0.0
    kl_weight: float = 0.5
    argmax_weight: float = 0.5
    token_weighting: str = "none"
    loss_chunk_tokens: int = 256

    @property
    def distils(self) -> bool:
        """Whether the final exit is part of the objective."""
        return self.kl_weight > 0 or self.argmax_weight > 0


@dataclass(frozen=True)
class InferenceConfig:
    """Defaults for generation; each request may override them.

    Attributes:
        threshold: leave at an exit whose confidence is strictly above it. One number, or one per exit layer.
            1.0 never exits.
        exits: the exit layers in use; null means all.
    """

    threshold: float | tuple[float, ...] = 0.8
    exits: tuple[int, ...] | None = None


@dataclass(frozen=True)
class EarlyExitConfig:
    """`model.early_exit`.

    Attributes:
        layers: exit layers, 1-based: an exit at n reads the output of transformer layer n.
        head: the modules of every exit.
        init: `ridge` (closed form), `copy` (from the backbone's own modules) or `random`.
        ridge: settings of the closed form.
        tuning: the tuning objective.
        inference: defaults for generation.
    """

    layers: tuple[int, ...]
    head: HeadConfig = field(default_factory=HeadConfig)
    init: str = "ridge"
    ridge: RidgeConfig = field(default_factory=RidgeConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)

    @property
    def needs_final_exit(self) -> bool:
        """Whether tuning needs the final exit's state, i.e. the whole depth of the backbone."""
        return self.tuning.distils or self.init == "ridge"

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
    config = build_config(EarlyExitConfig, raw, key, faults)
    if config is not None:
        faults += _check_layers(config, num_layers, key)
        faults += _check_head(config, vocab_size, key)
        faults += _check_tuning(config, key)
        faults += _check_inference(config, key)
    if faults:
        raise ConfigError(*faults)
    return config


def check_thresholds(threshold, exits: int, key: str) -> list[Fault]:
    """Faults of a threshold: one number or one per exit in use, each within [0, 1]."""
    values = threshold if isinstance(threshold, list | tuple) else (threshold,)
    faults = []
    if isinstance(threshold, list | tuple) and len(values) != exits:
        faults.append(
            Fault(
                key,
                list(values),
                f"{len(values)} thresholds for {exits} exits",
                "give one per exit, or one number",
            )
        )
    if not all(_is_number(v) and 0.0 <= v <= 1.0 for v in values):
        faults.append(
            Fault(
                key, threshold, "a confidence threshold lies within [0, 1]", "use e.g. 0.8; 1.0 never exits"
            )
        )
    return faults


def _check_layers(config: EarlyExitConfig, num_layers: int, key: str) -> list[Fault]:
    key, layers = f"{key}.layers", list(config.layers)
    if not layers:
        return [Fault(key, layers, "at least one exit layer is needed", f"name layers from 1..{num_layers}")]
    faults = []
    outside = [n for n in layers if not 1 <= n <= num_layers]
    if outside:
        faults.append(
            Fault(
                key, layers, f"{outside} not within 1..model.num_layers={num_layers}", f"use 1..{num_layers}"
            )
        )
    if len(set(layers)) != len(layers):
        faults.append(Fault(key, layers, "an exit layer is named twice", "name each layer once"))
    elif layers != sorted(layers):
        faults.append(Fault(key, layers, "exit layers must ascend", f"write {sorted(layers)}"))
    return faults


def _check_head(config: EarlyExitConfig, vocab_size: int | None, key: str) -> list[Fault]:
    head, faults = config.head, []
    if head.projection not in PROJECTIONS:
        faults.append(_one_of(f"{key}.head.projection", head.projection, PROJECTIONS))
    if head.projection == "tied" and head.train_projection:
        rule = "a tied projection is the backbone's, which stays frozen"
        faults.append(Fault(f"{key}.head.train_projection", True, rule, "use projection=untied, or false"))
    if head.shortlist_size < 1 or (
        vocab_size and head.projection == "shortlist" and head.shortlist_size > vocab_size
    ):
        rule = f"must lie within 1..{vocab_size or 'the vocabulary size'}"
        faults.append(
            Fault(
                f"{key}.head.shortlist_size", head.shortlist_size, rule, "use e.g. 8192, or projection=tied"
            )
        )
    if config.init not in INITIALISATIONS:
        faults.append(_one_of(f"{key}.init", config.init, INITIALISATIONS))
    if config.init == "ridge" and not head.linear:
        rule = "ridge fits the linear translator, which this head lacks"
        faults.append(Fault(f"{key}.init", "ridge", rule, "set head.linear=true, or init=copy"))
    if config.ridge.tokens < 1:
        faults.append(Fault(f"{key}.ridge.tokens", config.ridge.tokens, "must be positive", "use e.g. 40960"))
    if not config.ridge.penalty > 0:
        faults.append(
            Fault(f"{key}.ridge.penalty", config.ridge.penalty, "must be positive", "use e.g. 0.01")
        )
    return faults


def _check_tuning(config: EarlyExitConfig, key: str) -> list[Fault]:
    tuning, faults, key = config.tuning, [], f"{key}.tuning"
    weights = tuning.loss_weights
    if weights is not None and len(weights) != len(config.layers):
        rule = f"{len(weights)} weights for {len(config.layers)} exit layers"
        faults.append(Fault(f"{key}.loss_weights", list(weights), rule, "give one per exit layer, or null"))
    if weights is not None and any(w < 0 for w in weights):
        faults.append(Fault(f"{key}.loss_weights", list(weights), "a weight is negative", "use 0 or more"))
    elif weights and not any(weights):
        remedy = "give at least one exit a weight above 0"
        faults.append(Fault(f"{key}.loss_weights", list(weights), "no exit would be tuned", remedy))
    for name in ("ce_weight", "kl_weight", "argmax_weight"):
        if getattr(tuning, name) < 0:
            faults.append(
                Fault(f"{key}.{name}", getattr(tuning, name), "must not be negative", "use 0 or more")
            )
    if tuning.ce_weight == 0 and not tuning.distils:
        rule = "with kl_weight=0 and argmax_weight=0 too there is no objective"
        faults.append(Fault(f"{key}.ce_weight", 0, rule, "set ce_weight or kl_weight above 0"))
    if tuning.token_weighting not in TOKEN_WEIGHTINGS:
        faults.append(_one_of(f"{key}.token_weighting", tuning.token_weighting, TOKEN_WEIGHTINGS))
    if tuning.loss_chunk_tokens < 1:
        faults.append(
            Fault(f"{key}.loss_chunk_tokens", tuning.loss_chunk_tokens, "must be positive", "use e.g. 256")
        )
    return faults


def _check_inference(config: EarlyExitConfig, key: str) -> list[Fault]:
    exits, faults = config.inference.exits, []
    if exits is not None and not set(exits) <= set(config.layers):
        rule = f"not all of {list(config.layers)}"
        faults.append(
            Fault(f"{key}.inference.exits", list(exits), rule, "name exit layers that exist, or null")
        )
    if exits is not None and list(exits) != sorted(set(exits)):
        rule = "exits must ascend, each named once"
        faults.append(Fault(f"{key}.inference.exits", list(exits), rule, f"write {sorted(set(exits))}"))
    count = len(config.layers if exits is None else exits)
    return faults + check_thresholds(config.inference.threshold, count, f"{key}.inference.threshold")


def _one_of(key: str, value, choices: tuple[str, ...]) -> Fault:
    nearest = difflib.get_close_matches(str(value), choices, 1)
    remedy = f"did you mean {nearest[0]}?" if nearest else f"use {' | '.join(choices)}"
    return Fault(key, value, f"not one of {', '.join(choices)}", remedy)


def build_config(kind, raw, key: str, faults: list[Fault]):
    """Builds the frozen dataclass `kind`, nested ones included, from a mapping; None if it cannot be built.

    Args:
        kind: a dataclass whose fields have types, and defaults unless they are required.
        raw: plain containers.
        key: dotted name of the section, for messages; may be empty.
        faults: receives unknown keys (with the nearest known one), wrong types and missing values.
    """
    if not isinstance(raw, Mapping):
        faults.append(
            Fault(
                key, raw, "must be a mapping", f"give {', '.join(f.name for f in dataclasses.fields(kind))}"
            )
        )
        return None
    hints, known = typing.get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    values, before = {}, len(faults)
    for name, value in raw.items():
        path = f"{key}.{name}" if key else str(name)
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, 1)
            remedy = f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(known)}"
            faults.append(Fault(path, value, "unknown key", remedy))
        elif dataclasses.is_dataclass(hints[name]):
            values[name] = build_config(hints[name], {} if value is None else value, path, faults)
        else:
            values[name] = _convert(hints[name], value, path, faults)
    for name, item in known.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in values:
            path = f"{key}.{name}" if key else name
            faults.append(Fault(path, None, "is required", f"set {path}"))
    return kind(**values) if len(faults) == before else None


def _convert(hint, value, path: str, faults: list[Fault]):
    """Checks `value` against a type hint; integers pass as floats, lists as tuples."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if option is float and _is_number(value):
            return float(value)
        if option is bool and isinstance(value, bool):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option is str and isinstance(value, str):
            return value
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            item = typing.get_args(option)[0]
            inner: list[Fault] = []
            converted = tuple(_convert(item, v, path, inner) for v in value)
            if not inner:
                return converted
    names = " or ".join(_type_name(option) for option in options)
    faults.append(Fault(path, value, f"expected {names}, got {type(value).__name__}", f"write {names}"))
    return None


def _type_name(option) -> str:
    if option is type(None):
        return "null"
    if typing.get_origin(option) is tuple:
        return f"a list of {typing.get_args(option)[0].__name__}"
    return option.__name__


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value):
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
