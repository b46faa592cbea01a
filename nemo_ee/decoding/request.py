# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A generation request: NeMo's length and sampling parameters and early-exit options, checked together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from nemo_ee.config import EarlyExitConfig, check_thresholds
from nemo_ee.decoding.confidence_rules import CONFIDENCE_RULES
from nemo_ee.decoding.decoding_memory import KV_POLICIES
from nemo_ee.decoding.leaving import NEVER, is_asked
from nemo_ee.errors import ConfigError, Fault
from nemo_ee.schema import build_config, one_of

DRAFTS_ABOVE = 0.4
"""Threshold of lossless requests that give none, by the maximum probability. The model's own say when a token may stay;
drafts only have to be worth their time (with SmolLM2-135M, 0.2 to 0.5 are equally good)."""
LOWEST_TEMPERATURE = 1e-6
"""Below it logits divided by the temperature leave float32's range."""


@dataclass(frozen=True)
class SamplingOptions:
    """NeMo's sampling parameters. Defaults are NeMo's (`get_default_sampling_params`), but for `add_BOS`.

    Attributes:
        use_greedy: take the most probable token; the next three are then ignored.
        temperature: divides logits before sampling; at least `LOWEST_TEMPERATURE`, or anything from 0 on if greedy.
        top_k: sample among the k most probable tokens; 0 or -1 for all.
        top_p: sample among the most probable tokens that together have this probability; 0 or 1 for all.
        repetition_penalty: logits of tokens that the text has already are divided by it where positive and
            multiplied where negative (arXiv:1909.05858), before any exit is asked and also for greedy decoding, as in
            transformers. (NeMo 2.4.1 ignores it then.)
        add_BOS: put the tokenizer's BOS before each text that does not begin with it. None is the model's rule,
            see `TextTokenizer`; the dictionary of NeMo's own defaults says True.
        all_probs: also return the log-probabilities of the tokens and of the whole vocabulary.
        compute_logprob: return the log-probabilities of the prompts' own tokens, and generate nothing.
        logprobs: keep the log-probability of every generated token, and of so many of the most probable ones, by the
            exit that the token left at (see `nemo_ee.decoding.logprobs`). None keeps none.
        prompt_logprobs: the same of every token of the prompt but its first, at full depth; with `max_length=0` nothing
            is generated.
        end_strings: a sequence ends with the token that completes one in its generated text. As with NeMo, tokens and
            text are returned with it, here with all of that token: NeMo goes on where a token has more than the
            string's end. `<|endoftext|>` stands for EOS; that and all else that ends the model's texts
            (`TextTokenizer.eos_ids`) always ends it.
    """

    use_greedy: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    add_BOS: bool | None = None
    all_probs: bool = False
    compute_logprob: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    end_strings: tuple[str, ...] = ("<|endoftext|>", "<extra_id_1>")

    @property
    def keeps_logprobs(self) -> bool:
        """Whether more is kept of a prediction than its token and how sure it is."""
        return self.all_probs or self.logprobs is not None

    @property
    def tokens_alone(self) -> bool:
        """Whether a prediction's most probable token is all that is asked for, but for tokens that may not come yet."""
        return self.use_greedy and not self.keeps_logprobs and self.repetition_penalty == 1.0


@dataclass(frozen=True)
class LengthOptions:
    """NeMo's length parameters.

    Attributes:
        max_length: tokens to generate, at most.
        min_length: tokens before a token that ends texts may come.
    """

    max_length: int = 30
    min_length: int = 0


@dataclass(frozen=True)
class ExitOptions:
    """When tokens may leave; null takes the model's `early_exit.inference`. Where that has no threshold, exits are off
    unless the request has one, or is lossless.

    Attributes:
        threshold: leave at a confidence strictly above it; one number, or one per exit in use. 1.0 never
            exits. Null is `DRAFTS_ABOVE` for lossless requests by the maximum probability.
        exits: exit layers in use, ascending.
        max_pending: tokens of a sequence that may wait at an exit; the next one goes through all layers.
        lossless: exits only draft; the full model verifies every token, and the text is the full model's.
        always: ask exits for every token, whether that pays or not: the text then depends neither on what decodes
            beside it nor on the machine's prices. Null means no; where tokens are drawn with an explicit seed, yes.
        confidence: the rule by which exits are sure: a name in `CONFIDENCE_RULES`. Thresholds belong to a rule:
            with another one than the model's, `threshold` must be given.
        kv_policy: see `nemo_ee.decoding.decoding_memory.KV_POLICIES`.
    """

    threshold: float | tuple[float, ...] | None = None
    exits: tuple[int, ...] | None = None
    max_pending: int | None = None
    lossless: bool | None = None
    always: bool | None = None
    confidence: str | None = None
    kv_policy: str = "catch_up"


@dataclass(frozen=True)
class GenerationRequest:
    """Everything about a generation but the prompts.

    Attributes:
        max_length: tokens to generate, at most.
        min_length: tokens before a token that ends texts may come.
        sampling: how tokens are chosen.
        exits: exit layer -> threshold; empty generates at full depth.
        max_pending: see `EarlyExitDecoder.step`.
        lossless: see `ExitOptions`.
        always: see `ExitOptions`.
        confidence: see `ExitOptions`.
        kv_policy: see `ExitOptions`.
    """

    max_length: int = 30
    min_length: int = 0
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    exits: dict[int, float] = field(default_factory=dict)
    max_pending: int | None = None
    lossless: bool = False
    always: bool = False
    confidence: str = "max_probability"
    kv_policy: str = "catch_up"

    @cached_property
    def asked(self) -> list[int]:
        """Exit layers that may let a token leave, ascending."""
        return [n for n, threshold in sorted(self.exits.items()) if is_asked(threshold)]

    def threshold(self, layer: int) -> float:
        """Of the exit on a layer; `NEVER` for exits that are not used."""
        return self.exits.get(layer, NEVER)


NOT_OURS = {"compute_attention_mask", "early_exit"}
"""Keys of sampling parameters that `SamplingOptions` leaves to others."""


def parse_request(
    length_params: Mapping | None,
    sampling_params: Mapping | None,
    early_exit: Mapping | bool | None,
    config: EarlyExitConfig,
    seeded: bool = False,
) -> GenerationRequest:
    """Checks and completes a request.

    Args:
        length_params: NeMo's `max_length` and `min_length`; None for NeMo's defaults.
        sampling_params: NeMo's sampling parameters, any subset; None for NeMo's defaults. May hold
            `early_exit`.
        early_exit: fields of `ExitOptions`, each optional; False for full depth. Goes before
            `sampling_params["early_exit"]`, which goes before the model's `early_exit.inference`.
        config: the model's.
        seeded: the caller has chosen the seed of what is drawn, and wants the same text again.

    Raises:
        ConfigError: listing every fault.
    """
    faults: list[Fault] = []
    sampling = {} if sampling_params is None else sampling_params
    if isinstance(sampling, Mapping):
        if early_exit is None:
            early_exit = sampling.get("early_exit")
        sampling = {key: value for key, value in sampling.items() if key not in NOT_OURS}
    lengths = build_config(
        LengthOptions, _given({} if length_params is None else length_params), "length_params", faults
    )
    options = build_config(SamplingOptions, _given(sampling), "sampling_params", faults)
    if lengths is not None:
        faults += [
            Fault(f"length_params.{name}", value, "must be a whole number, 0 or more", "use e.g. 30")
            for name, value in vars(lengths).items()
            if value < 0
        ]
    if options is not None:
        faults += _sampling_faults(options)
    exits, others = parse_exits(early_exit, config, faults)
    if faults:
        raise ConfigError(*faults)
    return GenerationRequest(
        lengths.max_length,
        lengths.min_length,
        options,
        exits,
        others.max_pending,
        bool(others.lossless),
        not others.lossless and (_is_repeatable(options, seeded) if others.always is None else others.always),
        others.confidence or config.inference.confidence,
        others.kv_policy,
    )


def _is_repeatable(sampling: SamplingOptions, seeded: bool) -> bool:
    """Whether the same request is to get the same text, whatever decodes beside it."""
    return seeded and not sampling.use_greedy


def parse_exits(
    early_exit: Mapping | bool | None, config: EarlyExitConfig, faults: list[Fault]
) -> tuple[dict[int, float], ExitOptions]:
    """Exit layer -> threshold, and all options; appends to `faults`.

    Args:
        early_exit: as for `parse_request`.
        config: the model's.
        faults: receives what is wrong.
    """
    if early_exit is False:
        return {}, ExitOptions()
    if early_exit is None or early_exit is True:
        early_exit = {}
    if not isinstance(early_exit, Mapping):
        faults.append(Fault("early_exit", early_exit, "must be a mapping or false", "give threshold, exits"))
        return {}, ExitOptions()
    before = len(faults)
    options = build_config(ExitOptions, _given(early_exit), "early_exit", faults)
    if options is None:
        return {}, ExitOptions()
    usual = config.layers if config.inference.exits is None else config.inference.exits
    layers = usual if options.exits is None else options.exits
    if not set(layers) <= set(config.layers):
        rule = f"not all of the model's exits {list(config.layers)}"
        remedy = "name exit layers that exist, or null for all"
        faults.append(Fault("early_exit.exits", list(layers), rule, remedy))
    elif list(layers) != sorted(set(layers)):
        rule = "exits must ascend, each named once"
        faults.append(Fault("early_exit.exits", list(layers), rule, f"write {sorted(set(layers))}"))
    elif not layers:
        faults += _faults_without_exits(options, config)
    elif options.threshold is not None:
        faults += check_thresholds(options.threshold, len(layers), "early_exit.threshold")
    if options.max_pending is not None and options.max_pending < 0:
        rule = "must be a whole number, 0 or more"
        faults.append(Fault("early_exit.max_pending", options.max_pending, rule, "or null: no limit"))
    faults += _decoding_faults(options, config)
    if len(faults) > before:
        return {}, ExitOptions()
    if isinstance(options.threshold, tuple):
        return dict(zip(layers, options.threshold, strict=True)), options
    if options.threshold is not None:
        return dict.fromkeys(layers, options.threshold), options
    own = config.inference.confidence
    if options.lossless and (options.confidence or own) == "max_probability":
        return dict.fromkeys(layers, DRAFTS_ABOVE), options
    if layers and options.confidence not in (None, own):
        rule = f"the model's thresholds are for confidence={own}, not for {options.confidence}"
        faults.append(Fault("early_exit.threshold", None, rule, "give one, or one per exit"))
        return {}, ExitOptions()
    if config.inference.known_threshold is None:
        return _no_thresholds(options, faults), options
    return _default_thresholds(layers, usual, config, faults), options


EXITS_ARE_OFF = (
    "early exits are off, as the model has no thresholds for them: scripts/calibrate_early_exit.py writes some that "
    "keep an agreement into a copy of the checkpoint; early_exit.threshold=0.8 takes one without"
)
"""Said once where a request says nothing of exits, and the model was never calibrated."""


def _no_thresholds(options: ExitOptions, faults: list[Fault]) -> dict[int, float]:
    """Of exits that nobody has chosen a threshold for: none is used."""
    asked = {"exits": list(options.exits or ()), "always": options.always, "max_pending": options.max_pending}
    named = [f"early_exit.{name}={value}" for name, value in asked.items() if value not in (None, [], False)]
    if named:
        rule = f"the model has none, as it was never calibrated, and without one {', '.join(named)} means nothing"
        remedy = "give one, e.g. early_exit.threshold=0.8, or calibrate (scripts/calibrate_early_exit.py)"
        faults.append(Fault("early_exit.threshold", None, rule, remedy))
    return {}


def _faults_without_exits(options: ExitOptions, config: EarlyExitConfig) -> list[Fault]:
    """What is asked of exits where none is in use: who forgets the exits' file asks just so."""
    rule, remedy = "early_exit.exits=[] uses no exit", "name exits, or leave it null"
    if not config.layers:
        rule, remedy = "the model has no exits", "load tuned ones (adapter_file=exits.nemo), or leave it null"
    asked = {
        "threshold": options.threshold not in (None, NEVER) and options.threshold != (),
        "lossless": bool(options.lossless),
        "always": bool(options.always),
        "max_pending": options.max_pending is not None,
    }
    return [
        Fault(f"early_exit.{name}", getattr(options, name), rule, remedy)
        for name, given in asked.items()
        if given
    ]


def _decoding_faults(options: ExitOptions, config: EarlyExitConfig) -> list[Fault]:
    faults, rules = [], tuple(CONFIDENCE_RULES)
    if options.confidence is not None and options.confidence not in rules:
        faults.append(one_of("early_exit.confidence", options.confidence, rules))
    elif options.confidence is None and config.inference.confidence not in rules:
        faults.append(one_of("model.early_exit.inference.confidence", config.inference.confidence, rules))
    if options.kv_policy not in KV_POLICIES:
        faults.append(one_of("early_exit.kv_policy", options.kv_policy, KV_POLICIES))
    elif options.lossless and options.kv_policy != "catch_up":
        rule = "lossless decoding verifies what waits at exits, which only catch_up keeps"
        faults.append(
            Fault("early_exit.kv_policy", options.kv_policy, rule, "use catch_up, or lossless=false")
        )
    name = options.confidence or config.inference.confidence
    if options.lossless and name in rules and CONFIDENCE_RULES[name].looks_back:
        known = ", ".join(rule for rule in rules if not CONFIDENCE_RULES[rule].looks_back)
        rule = "lossless decoding asks one exit per token, and this rule compares exits"
        faults.append(Fault("early_exit.confidence", name, rule, f"use one of {known}, or lossless=false"))
    if options.lossless and options.always:
        rule = "lossless decoding chooses by itself when an exit drafts, and its text does not depend on that"
        faults.append(Fault("early_exit.always", True, rule, "use null, or lossless=false"))
    if options.lossless and options.max_pending is not None:
        rule = "lossless decoding chooses by itself how many tokens wait"
        faults.append(
            Fault("early_exit.max_pending", options.max_pending, rule, "use null, or lossless=false")
        )
    return faults


def _default_thresholds(
    layers: Sequence[int], usual: Sequence[int], config: EarlyExitConfig, faults: list[Fault]
) -> dict[int, float]:
    """The model's thresholds of these exits."""
    threshold = config.inference.known_threshold
    assert threshold is not None, "the model has thresholds"
    if not isinstance(threshold, tuple):
        return dict.fromkeys(layers, threshold)
    known = dict(zip(usual, threshold, strict=True))
    if without := [n for n in layers if n not in known]:
        rule = f"the model has thresholds for exits {list(usual)}, none for {without}"
        faults.append(Fault("early_exit.threshold", None, rule, f"give one for {list(layers)}, or one each"))
        return {}
    return {n: known[n] for n in layers}


def _given(values: Any) -> Any:
    """What is not null, in plain containers: lists may come as OmegaConf's. What is no mapping stays as it is."""
    if not isinstance(values, Mapping):
        return values
    return {
        key: list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for key, value in values.items()
        if value is not None
    }


def _sampling_faults(options: SamplingOptions) -> list[Fault]:
    rules = {
        "temperature": (
            options.temperature >= (0 if options.use_greedy else LOWEST_TEMPERATURE),
            "must be 0 or more" if options.use_greedy else f"must be at least {LOWEST_TEMPERATURE} to sample",
            "use 1.0, or decode greedily",
        ),
        "top_k": (options.top_k >= -1, "must be a whole number, -1 or more", "use 0 or -1 for all tokens"),
        "top_p": (0 <= options.top_p <= 1, "lies within [0, 1]", "use 1.0 for all tokens"),
        "repetition_penalty": (options.repetition_penalty > 0, "must be above 0", "use 1.0 for none"),
        **{
            name: (
                (value := getattr(options, name)) is None or (value >= 0 and not options.compute_logprob),
                "must be a whole number, 0 or more, and not beside compute_logprob",
                "use e.g. 5, or null for none",
            )
            for name in ("logprobs", "prompt_logprobs")
        },
        "end_strings": ("" not in options.end_strings, "every text ends with an empty one", "leave that out"),
    }
    return [
        Fault(f"sampling_params.{name}", getattr(options, name), rule, remedy)
        for name, (holds, rule, remedy) in rules.items()
        if not holds
    ]
