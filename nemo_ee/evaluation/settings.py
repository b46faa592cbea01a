# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The settings of an evaluation, read once from `conf/evaluate_early_exit.yaml` and its overrides."""

from collections.abc import Mapping
from dataclasses import dataclass

from nemo_ee.config import check_thresholds
from nemo_ee.errors import Fault
from nemo_ee.schema import read_settings


@dataclass(frozen=True)
class HeldOutConfig:
    """Held-out text.

    Attributes:
        prefix: of an indexed dataset, without `.bin` and `.idx`.
        sequences: pieces of it, evenly spaced.
        seq_length: tokens per piece.
        batch_size: pieces at a time.
    """

    prefix: str
    sequences: int = 40
    seq_length: int = 256
    batch_size: int = 4


@dataclass(frozen=True)
class SweepConfig:
    """Generation over a sweep of thresholds, always greedy.

    Attributes:
        prompts: texts to continue.
        chat_prompts_file: a file of prompts (see `read_prompt_file`), each answered in the tokenizer's chat
            template. Without this and `prompts`, the beginnings of held-out documents are continued.
        num_prompts: how many documents.
        prompt_tokens: tokens of each document that are the prompt.
        tokens_to_generate: per prompt, at most.
        thresholds: confidences above which a token leaves.
        exits: exit layers in use; null means all.
        timed_prompts: how many of the prompts are timed, one by one (batch 1).
        repeats: how often each timed prompt is generated at every threshold and at full depth, in turn.
        sample_threshold: the threshold of the texts shown token by token; one of `thresholds`.
        samples: how many texts are shown.
    """

    prompts: tuple[str, ...] | None = None
    chat_prompts_file: str | None = None
    num_prompts: int = 16
    prompt_tokens: int = 32
    tokens_to_generate: int = 40
    thresholds: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    exits: tuple[int, ...] | None = None
    timed_prompts: int = 3
    repeats: int = 4
    sample_threshold: float = 0.7
    samples: int = 2


@dataclass(frozen=True)
class EvaluationConfig:
    """An evaluation of a model with early exits.

    Attributes:
        gpt_model_file: the base, or a model merged with its exits, a `.nemo`.
        data: held-out text.
        generation: the sweep.
        adapter_file: the exits alone; null if they are part of the model.
        output_dir: where the report goes.
        tuning_log_dir: TensorBoard logs of the tuning run, for its curve; null for none.
        seed: of the bootstrap.
        precision: of weights and activations: 32, bf16 or 16.
    """

    gpt_model_file: str
    data: HeldOutConfig
    generation: SweepConfig = SweepConfig()
    adapter_file: str | None = None
    output_dir: str = "report"
    tuning_log_dir: str | None = None
    seed: int = 1234
    precision: str | int = 32

    @classmethod
    def from_dict(cls, values: Mapping) -> "EvaluationConfig":
        """Checks plain values (as from YAML) and builds the configuration.

        Raises:
            ConfigError: listing every unknown key, missing value and value that breaks its rule.
        """
        return read_settings(cls, values, _faults)


def _faults(config: EvaluationConfig) -> list[Fault]:
    faults = _check_counts("data", config.data, ("sequences", "seq_length", "batch_size"))
    return faults + _check_sweep(config.generation)


def _check_counts(section: str, config: object, names: tuple[str, ...]) -> list[Fault]:
    return [
        Fault(f"{section}.{name}", getattr(config, name), "must be positive", "use 1 or more")
        for name in names
        if getattr(config, name) < 1
    ]


def _check_sweep(sweep: SweepConfig) -> list[Fault]:
    counts = ("num_prompts", "prompt_tokens", "timed_prompts", "repeats")
    faults = _check_counts("generation", sweep, counts)
    if sweep.prompts is not None and sweep.chat_prompts_file is not None:
        rule = "with generation.prompts there are two sets of prompts"
        remedy = "set one of them to null"
        faults.append(Fault("generation.chat_prompts_file", sweep.chat_prompts_file, rule, remedy))
    if sweep.tokens_to_generate < 2:
        rule = "only tokens after the first can leave early"
        faults.append(Fault("generation.tokens_to_generate", sweep.tokens_to_generate, rule, "use 2 or more"))
    values = list(sweep.thresholds)
    if not values or values != sorted(set(values)):
        rule = "must be thresholds in ascending order, each once"
        faults.append(Fault("generation.thresholds", values, rule, "e.g. [0.5,0.7,0.9]"))
    faults += check_thresholds(values, len(values), "generation.thresholds")
    if sweep.samples and values and sweep.sample_threshold not in values:
        rule = f"must be one of generation.thresholds={values}"
        remedy = "name one of them, or set generation.samples=0"
        faults.append(Fault("generation.sample_threshold", sweep.sample_threshold, rule, remedy))
    if sweep.prompts is not None and not sweep.prompts:
        faults.append(Fault("generation.prompts", [], "must have a prompt", "give one, or null"))
    return faults
