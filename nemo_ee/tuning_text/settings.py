# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The settings of text for tuning, read once from `conf/generate_tuning_text.yaml` and its overrides."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_ee.decoding.cpu.lean_weights import WEIGHT_KINDS
from nemo_ee.errors import Fault
from nemo_ee.schema import one_of, read_settings

SOURCES = ("gsm8k", "boolq", "wikipedia")


@dataclass(frozen=True)
class PromptsConfig:
    """What is asked.

    Attributes:
        file: a `.jsonl` file with a `prompt`, `text`, `question` or `messages` per line, or a text file with a prompt
            per line; null builds prompts from `sources`.
        sources: some of `SOURCES`, taken in turn, each in a random order.
        directory: where the sources' files are kept; what is missing there is downloaded.
        exclude_file: like `file`: prompts that must not be among them, e.g. those of an evaluation.
        count: how many, at most; null for all.
        system: a system message before each prompt that brings none; null for none.
    """

    file: str | None = None
    sources: tuple[str, ...] = SOURCES
    directory: str = "downloads"
    exclude_file: str | None = None
    count: int | None = None
    system: str | None = None


@dataclass(frozen=True)
class AnswersConfig:
    """How answers are written: NeMo's inference keys.

    Attributes:
        greedy: take the most probable token; otherwise sample.
        temperature: divides logits before sampling.
        top_k: sample among the k most probable tokens; 0 for all.
        top_p: sample among the most probable tokens that together have this probability.
        repetition_penalty: above 1 makes tokens that the text has already rarer (sampling only).
        tokens_to_generate: per answer, at most.
    """

    greedy: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    tokens_to_generate: int = 200

    def generate_arguments(self) -> dict[str, dict[str, Any]]:
        """`length_params` and `sampling_params` of `parse_request`."""
        names = ("temperature", "top_k", "top_p", "repetition_penalty")
        sampling = {"use_greedy": self.greedy, **{name: getattr(self, name) for name in names}}
        return {"length_params": {"max_length": self.tokens_to_generate}, "sampling_params": sampling}


@dataclass(frozen=True)
class TuningTextConfig:
    """A model that answers prompts.

    Attributes:
        gpt_model_file: the base, a `.nemo`; exits that it has are not used.
        output_prefix: of the files: `…_train.jsonl`, `…_validation.jsonl`, and at last `….json`.
        prompts: what is asked.
        inference: how it is answered.
        validation_share: share of the prompts whose answers are for validation.
        minutes: of generating, all runs together: no further block of prompts is begun that would not fit; null for
            no limit.
        batch_size: answers that are written at a time.
        weights: how decoding holds them: `native`, `bf16` or `int8`, see `prepare_decoding`.
        seed: of the order of prompts and of sampling.
        tensor_model_parallel_size: processes that share each layer.
        pipeline_model_parallel_size: stages of layers; trainer.devices is the product of both sizes.
        megatron_amp_O2: keep weights in the trainer's precision rather than in float32.
        precision: of the computation: 32, bf16 or 16.
    """

    gpt_model_file: str
    output_prefix: str
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    inference: AnswersConfig = field(default_factory=AnswersConfig)
    validation_share: float = 0.05
    minutes: float | None = None
    batch_size: int = 32
    weights: str = "native"
    seed: int = 1234
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    megatron_amp_O2: bool = False
    precision: str | int = 32

    @classmethod
    def from_dict(cls, values: Mapping) -> "TuningTextConfig":
        """Checks plain values (as from YAML) and builds the configuration.

        Raises:
            ConfigError: listing every unknown key, missing value and value that breaks its rule.
        """
        return read_settings(cls, values, _faults)


def _faults(config: TuningTextConfig) -> list[Fault]:
    faults, prompts = [], config.prompts
    if prompts.file is None:
        faults += [
            one_of("prompts.sources", name, SOURCES) for name in prompts.sources if name not in SOURCES
        ]
        if not prompts.sources:
            faults.append(Fault("prompts.sources", [], "nothing would be asked", "name one, or prompts.file"))
        if len(set(prompts.sources)) < len(prompts.sources):
            rule = "each can be named once"
            faults.append(Fault("prompts.sources", list(prompts.sources), rule, "leave out the second"))
    counts = {"prompts.count": prompts.count, "batch_size": config.batch_size}
    counts |= {"inference.tokens_to_generate": config.inference.tokens_to_generate}
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    for name, value in {**counts, **{size: getattr(config, size) for size in sizes}}.items():
        if value is not None and value < 1:
            faults.append(Fault(name, value, "must be positive", "use 1 or more"))
    if not 0.0 <= config.validation_share < 1.0:
        rule = "must be a share from 0 to less than 1"
        faults.append(Fault("validation_share", config.validation_share, rule, "use e.g. 0.05"))
    if config.minutes is not None and config.minutes <= 0:
        faults.append(
            Fault("minutes", config.minutes, "must be positive", "use e.g. 5, or null for no limit")
        )
    if config.weights not in WEIGHT_KINDS:
        faults.append(one_of("weights", config.weights, WEIGHT_KINDS))
    return faults
