# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The settings of an evaluation, read once from `conf/evaluate_early_exit.yaml` and its overrides."""

from dataclasses import dataclass
from typing import Annotated

from nemo_ee.config import check_thresholds
from nemo_ee.errors import Fault
from nemo_ee.schema import Positive, Settings, holds, one_of

TWO = holds(lambda tokens: tokens >= 2, "only tokens after the first can leave early", "use 2 or more")
CALIBRATED = "calibrated"
"""Stands for the checkpoint's own thresholds."""
Threshold = float | tuple[float, ...] | str


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
    sequences: Positive = 40
    seq_length: Positive = 256
    batch_size: Positive = 4


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
        thresholds: each a confidence above which a token leaves, or a list of one per exit in use, or `CALIBRATED`: the
            checkpoint's.
        exits: exit layers in use; null means all.
        timed_prompts: how many of the prompts are timed, one by one (batch 1).
        repeats: how often each timed prompt is generated at every threshold and at full depth, in turn.
        sample_threshold: the one of `thresholds` at which texts are shown token by token.
        samples: how many texts are shown.
    """

    prompts: tuple[str, ...] | None = None
    chat_prompts_file: str | None = None
    num_prompts: Positive = 16
    prompt_tokens: Positive = 32
    tokens_to_generate: Annotated[int, TWO] = 40
    thresholds: tuple[Threshold, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    exits: tuple[int, ...] | None = None
    timed_prompts: Positive = 3
    repeats: Positive = 4
    sample_threshold: Threshold = 0.7
    samples: int = 2


@dataclass(frozen=True)
class EvaluationConfig(Settings):
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

    def faults(self) -> list[Fault]:
        """See `Settings`."""
        return _check_sweep(self.generation)


def _check_sweep(sweep: SweepConfig) -> list[Fault]:
    faults = []
    if sweep.prompts is not None and sweep.chat_prompts_file is not None:
        rule = "with generation.prompts there are two sets of prompts"
        remedy = "set one of them to null"
        faults.append(Fault("generation.chat_prompts_file", sweep.chat_prompts_file, rule, remedy))
    values = [list(each) if isinstance(each, tuple) else each for each in sweep.thresholds]
    if not values or len(set(sweep.thresholds)) != len(values):
        rule = "must be thresholds, each once"
        faults.append(Fault("generation.thresholds", values, rule, "e.g. [0.5,[0.4,0.7],calibrated]"))
    for each in values:
        if isinstance(each, str):
            if each != CALIBRATED:
                faults.append(one_of("generation.thresholds", each, (CALIBRATED,)))
        else:
            count = len(each) if isinstance(each, list) else 1
            faults += check_thresholds(each, count, "generation.thresholds")
    if sweep.samples and values and sweep.sample_threshold not in sweep.thresholds:
        rule = f"must be one of generation.thresholds={values}"
        remedy = "name one of them, or set generation.samples=0"
        shown = sweep.sample_threshold
        shown = list(shown) if isinstance(shown, tuple) else shown
        faults.append(Fault("generation.sample_threshold", shown, rule, remedy))
    if sweep.prompts is not None and not sweep.prompts:
        faults.append(Fault("generation.prompts", [], "must have a prompt", "give one, or null"))
    return faults
