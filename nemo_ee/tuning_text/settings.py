# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The settings of text for tuning, read once from `conf/generate_tuning_text.yaml` and its overrides."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from nemo_ee.decoding.cpu.lean_weights import WEIGHT_KINDS
from nemo_ee.decoding.cpu.output_search import OUTPUT_LAYERS
from nemo_ee.errors import Fault
from nemo_ee.schema import Positive, Settings, choice, holds, one_of

SOURCES = ("gsm8k", "boolq", "wikipedia")
SHARE = holds(lambda share: 0.0 <= share < 1.0, "must be a share from 0 to less than 1", "use e.g. 0.05")
MINUTES = holds(lambda minutes: minutes > 0, "must be positive", "use e.g. 5, or null for no limit")


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
    count: Positive | None = None
    system: str | None = None


@dataclass(frozen=True)
class AnswersConfig:
    """How answers are written: NeMo's inference keys.

    Attributes:
        greedy: take the most probable token; otherwise sample.
        temperature: divides logits before sampling.
        top_k: sample among the k most probable tokens; 0 or -1 for all.
        top_p: sample among the most probable tokens that together have this probability.
        repetition_penalty: above 1 makes tokens that the text has already rarer.
        tokens_to_generate: per answer, at most.
    """

    greedy: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    tokens_to_generate: Positive = 200

    def generate_arguments(self) -> dict[str, dict[str, Any]]:
        """`length_params` and `sampling_params` of `parse_request`."""
        names = ("temperature", "top_k", "top_p", "repetition_penalty")
        sampling = {"use_greedy": self.greedy, **{name: getattr(self, name) for name in names}}
        return {"length_params": {"max_length": self.tokens_to_generate}, "sampling_params": sampling}


@dataclass(frozen=True)
class TuningTextConfig(Settings):
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
        output_layer: how greedy tokens of full depth are found: `exact8` or `full`, see `prepare_decoding`.
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
    validation_share: Annotated[float, SHARE] = 0.05
    minutes: Annotated[float | None, MINUTES] = None
    batch_size: Positive = 32
    weights: Annotated[str, choice(*WEIGHT_KINDS)] = "native"
    output_layer: Annotated[str, choice(*OUTPUT_LAYERS)] = "exact8"
    seed: int = 1234
    tensor_model_parallel_size: Positive = 1
    pipeline_model_parallel_size: Positive = 1
    megatron_amp_O2: bool = False
    precision: str | int = 32

    def faults(self) -> list[Fault]:
        """See `Settings`."""
        faults, prompts = [], self.prompts
        if prompts.file is None:
            faults += [
                one_of("prompts.sources", name, SOURCES) for name in prompts.sources if name not in SOURCES
            ]
            if not prompts.sources:
                remedy = "name one, or prompts.file"
                faults.append(Fault("prompts.sources", [], "nothing would be asked", remedy))
            if len(set(prompts.sources)) < len(prompts.sources):
                rule = "each can be named once"
                faults.append(Fault("prompts.sources", list(prompts.sources), rule, "leave out the second"))
        return faults
