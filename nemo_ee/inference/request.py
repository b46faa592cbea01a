# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A generation request: NeMo's length and sampling parameters and early-exit options, checked together."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nemo_ee.config import EarlyExitConfig, check_thresholds
from nemo_ee.errors import ConfigError, Fault


@dataclass(frozen=True)
class SamplingOptions:
    """NeMo's sampling parameters. Defaults are NeMo's (`get_default_sampling_params`).

    Attributes:
        use_greedy: take the most probable token; the next four are then ignored.
        temperature: divides logits before sampling.
        top_k: sample among the k most probable tokens; 0 for all.
        top_p: sample among the most probable tokens that together have this probability; 0 or 1 for all.
        repetition_penalty: logits of tokens that the text has already are divided by it where positive and
            multiplied where negative (arXiv:1909.05858). NeMo 2.4.1 ignores it unless it computes
            log-probabilities.
        add_BOS: put the tokenizer's BOS before each prompt.
        all_probs: also return the log-probabilities of the generated tokens and of the whole vocabulary.
        compute_logprob: return the log-probabilities of the prompts' own tokens, and generate nothing.
        end_strings: a sequence ends when its generated text ends with one. `<|endoftext|>` stands for EOS.
    """

    use_greedy: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    add_BOS: bool = True
    all_probs: bool = False
    compute_logprob: bool = False
    end_strings: tuple[str, ...] = ("<|endoftext|>", "<extra_id_1>")


@dataclass(frozen=True)
class GenerationRequest:
    """Everything about a generation but the prompts.

    Attributes:
        max_length: tokens to generate, at most.
        min_length: tokens before EOS may come.
        sampling: how tokens are chosen.
        exits: exit layer -> threshold; empty generates at full depth.
        max_pending: see `EarlyExitDecoder`.
    """

    max_length: int = 30
    min_length: int = 0
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    exits: dict[int, float] = field(default_factory=dict)
    max_pending: int | None = None


NOT_OURS = {"compute_attention_mask", "early_exit"}
"""Keys of sampling parameters that `SamplingOptions` leaves to others."""


def parse_request(
    length_params: Mapping | None,
    sampling_params: Mapping | None,
    early_exit: Mapping | bool | None,
    config: EarlyExitConfig,
) -> GenerationRequest:
    """Checks and completes a request.

    Args:
        length_params: NeMo's `max_length` and `min_length`; None for NeMo's defaults.
        sampling_params: NeMo's sampling parameters, any subset; None for NeMo's defaults. May hold
            `early_exit`.
        early_exit: `threshold`, `exits` and `max_pending`, each optional; False for full depth. Goes before
            `sampling_params["early_exit"]`, which goes before the model's `early_exit.inference`.
        config: the model's.

    Raises:
        ConfigError: listing every fault.
    """
    faults: list[Fault] = []
    lengths, sampling = dict(length_params or {}), dict(sampling_params or {})
    if early_exit is None:
        early_exit = sampling.get("early_exit")
    faults += _unknown("length_params", lengths, {"max_length", "min_length"})
    known = set(SamplingOptions.__dataclass_fields__)
    faults += _unknown("sampling_params", sampling, known | NOT_OURS)
    max_length, min_length = lengths.get("max_length", 30), lengths.get("min_length", 0) or 0
    for name, value in (("max_length", max_length), ("min_length", min_length)):
        if not _is_int(value) or value < 0:
            faults.append(
                Fault(f"length_params.{name}", value, "must be a whole number, 0 or more", "use e.g. 30")
            )
    options = {key: value for key, value in sampling.items() if key in known and value is not None}
    if isinstance(options.get("end_strings"), str):
        faults.append(
            Fault("sampling_params.end_strings", options["end_strings"], "must be a list", "wrap it in []")
        )
    options["end_strings"] = tuple(options.get("end_strings", SamplingOptions.end_strings))
    parsed = SamplingOptions(**options)
    faults += _sampling_faults(parsed)
    exits, max_pending = parse_exits(early_exit, config, faults)
    if faults:
        raise ConfigError(*faults)
    return GenerationRequest(max_length, min_length, parsed, exits, max_pending)


def parse_exits(
    early_exit: Mapping | bool | None, config: EarlyExitConfig, faults: list[Fault]
) -> tuple[dict[int, float], int | None]:
    """Exit layer -> threshold, and the cap on pending tokens; appends to `faults`.

    Args:
        early_exit: as for `parse_request`.
        config: the model's.
        faults: receives what is wrong.
    """
    if early_exit is False:
        return {}, None
    if early_exit is None or early_exit is True:
        early_exit = {}
    if not isinstance(early_exit, Mapping):
        faults.append(Fault("early_exit", early_exit, "must be a mapping or false", "give threshold, exits"))
        return {}, None
    before = len(faults)
    faults += _unknown("early_exit", dict(early_exit), {"threshold", "exits", "max_pending"})
    usual = config.layers if config.inference.exits is None else config.inference.exits
    exits = early_exit.get("exits")
    layers = usual if exits is None else exits
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not set(layers) <= set(config.layers):
        rule = f"not all of the model's exits {list(config.layers)}"
        faults.append(Fault("early_exit.exits", layers, rule, "name exit layers that exist, or null for all"))
        return {}, None
    layers = sorted(set(layers))
    threshold = early_exit.get("threshold")
    if threshold is None:
        threshold = config.inference.threshold
        if isinstance(threshold, tuple) and set(layers) <= set(usual):
            threshold = [threshold[usual.index(n)] for n in layers]
    threshold = (
        list(threshold) if isinstance(threshold, Sequence) and not isinstance(threshold, str) else threshold
    )
    faults += check_thresholds(threshold, len(layers), "early_exit.threshold")
    cap = early_exit.get("max_pending")
    if cap is not None and (not _is_int(cap) or cap < 0):
        faults.append(
            Fault("early_exit.max_pending", cap, "must be a whole number, 0 or more", "or null: no limit")
        )
    if len(faults) > before:
        return {}, None
    values = threshold if isinstance(threshold, list) else [threshold] * len(layers)
    return dict(zip(layers, values, strict=True)), cap


def _sampling_faults(options: SamplingOptions) -> list[Fault]:
    rules = {
        "temperature": (lambda v: v > 0, "must be above 0", "use 1.0; for greedy decoding set use_greedy"),
        "top_k": (
            lambda v: _is_int(v) and v >= 0,
            "must be a whole number, 0 or more",
            "use 0 for all tokens",
        ),
        "top_p": (lambda v: 0 <= v <= 1, "lies within [0, 1]", "use 1.0 for all tokens"),
        "repetition_penalty": (lambda v: v > 0, "must be above 0", "use 1.0 for none"),
    }
    faults = []
    for name, (holds, rule, remedy) in rules.items():
        value = getattr(options, name)
        if not _is_number(value) or not holds(value):
            faults.append(Fault(f"sampling_params.{name}", value, rule, remedy))
    return faults


def _unknown(key: str, given: dict, known: set[str]) -> list[Fault]:
    faults = []
    for name in given.keys() - known:
        nearest = difflib.get_close_matches(str(name), known, 1)
        remedy = f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(sorted(known))}"
        faults.append(Fault(f"{key}.{name}", given[name], "unknown key", remedy))
    return faults


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
