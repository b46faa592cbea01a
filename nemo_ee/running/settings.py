# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The settings of a generation run, read once from `conf/megatron_gpt_ee_generate.yaml` and its overrides."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from nemo_ee.decoding.cpu.lean_weights import WEIGHT_KINDS
from nemo_ee.decoding.cpu.output_search import OUTPUT_LAYERS
from nemo_ee.decoding.request import ExitOptions
from nemo_ee.errors import ConfigError, Fault
from nemo_ee.running.prompt_file import Prompt, read_texts
from nemo_ee.schema import Positive, Settings, choice, holds


@dataclass(frozen=True)
class SamplingConfig:
    """NeMo's inference keys.

    Attributes:
        greedy: take the most probable token; otherwise sample.
        top_k: sample among the k most probable tokens; 0 or -1 for all.
        top_p: sample among the most probable tokens that together have this probability.
        temperature: divides logits before sampling.
        add_BOS: put the tokenizer's BOS before each prompt, or not; null for the model's rule.
        tokens_to_generate: per prompt, at most.
        min_tokens_to_generate: before a text may end.
        repetition_penalty: above 1 makes tokens that the text has already rarer.
        logprobs: write the log-probability of every token, and of so many of the most probable; null for none.
        prompt_logprobs: the same of the prompt's tokens, at full depth.
        end_strings: generation ends with the token that completes one of these; `<|endoftext|>` stands for EOS.
    """

    greedy: bool = True
    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0
    add_BOS: bool | None = None
    tokens_to_generate: int = 64
    min_tokens_to_generate: int = 0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    end_strings: tuple[str, ...] = ("<|endoftext|>",)


@dataclass(frozen=True)
class GenerateConfig(Settings):
    """A generation run.

    Attributes:
        gpt_model_file: the base, or a model merged with its exits, a `.nemo`.
        adapter_file: the exits alone; null if they are part of the model.
        prompts: texts, or lists of token ids; null with `prompts_file`.
        prompts_file: a `.jsonl` file with a `prompt`, `text` or `question` per line, each a text or a list of token
            ids, or a text file with a prompt per line.
        chat: wrap every prompt in the tokenizer's chat template, as a question of the user.
        inference: how tokens are chosen.
        early_exit: when they may leave.
        batch_size: prompts at a time.
        seed: of sampling; null for torch's own.
        output_file: a JSONL file to write, one line per prompt; null for none.
        color: mark exits by colour: `always`, `never`, or `auto` (in a terminal).
        prices_file: JSON, see `prepare_decoding`.
        weights: how decoding holds them: `native`, `bf16` or `int8`, see `prepare_decoding`.
        output_layer: how greedy tokens of full depth are found: `exact8` or `full`, see `prepare_decoding`.
        tensor_model_parallel_size: processes that share each layer.
        pipeline_model_parallel_size: stages of layers; trainer.devices is the product of both sizes.
        megatron_amp_O2: keep weights in the trainer's precision rather than in float32.
        precision: of the computation: 32, bf16 or 16.
    """

    gpt_model_file: str
    adapter_file: str | None = None
    prompts: tuple[str | tuple[int, ...], ...] | None = None
    prompts_file: str | None = None
    chat: bool = False
    inference: SamplingConfig = field(default_factory=SamplingConfig)
    early_exit: ExitOptions = field(default_factory=ExitOptions)
    batch_size: Positive = 8
    seed: Annotated[
        int | None, holds(lambda seed: -(2**63) <= seed < 2**63, "must fit in 64 bits", "use e.g. 1234")
    ] = None
    output_file: str | None = None
    color: Annotated[str, choice("auto", "always", "never")] = "auto"
    prices_file: str | None = None
    weights: Annotated[str, choice(*WEIGHT_KINDS)] = "native"
    output_layer: Annotated[str, choice(*OUTPUT_LAYERS)] = "exact8"
    tensor_model_parallel_size: Positive = 1
    pipeline_model_parallel_size: Positive = 1
    megatron_amp_O2: bool = False
    precision: str | int = 32

    def faults(self) -> list[Fault]:
        """See `Settings`."""
        faults = []
        if (self.prompts is None) == (self.prompts_file is None):
            rule = "exactly one of prompts and prompts_file must be given"
            faults.append(Fault("prompts", self.prompts, rule, "set one, leave the other null"))
        elif self.prompts is not None and not self.prompts:
            remedy = "write e.g. prompts=['Once upon a time']"
            faults.append(Fault("prompts", [], "at least one prompt is needed", remedy))
        elif self.prompts is not None:
            faults += _kind_faults(self.prompts, self.chat, "prompts")
        if self.chat and self.inference.add_BOS is not None:
            rule = "with chat=true the tokenizer's template says where BOS stands"
            faults.append(
                Fault("inference.add_BOS", self.inference.add_BOS, rule, "set inference.add_BOS=null")
            )
        return faults

    def read_prompts(self) -> list[Prompt]:
        """The prompts, all of one kind.

        Raises:
            ConfigError: see `read_texts`; or they are of several kinds.
        """
        if self.prompts is not None:
            return [p if isinstance(p, str) else list(p) for p in self.prompts]
        assert self.prompts_file is not None, "checked on construction"
        prompts = read_texts(self.prompts_file, "prompts_file", token_ids=True)
        if faults := _kind_faults(prompts, self.chat, "prompts_file"):
            raise ConfigError(*faults)
        return prompts

    def generate_arguments(self) -> dict[str, Any]:
        """`length_params`, `sampling_params` and `early_exit` of `model.generate`."""
        options = self.inference
        lengths = {"max_length": options.tokens_to_generate, "min_length": options.min_tokens_to_generate}
        sampling = dict(vars(options), use_greedy=options.greedy)
        for name in ("greedy", "tokens_to_generate", "min_tokens_to_generate"):
            del sampling[name]
        exits = dict(vars(self.early_exit))
        return {"length_params": lengths, "sampling_params": sampling, "early_exit": exits}


def _kind_faults(prompts: Sequence[Any], chat: bool, key: str) -> list[Fault]:
    """Of prompts that are not all texts, or all token ids, or are token ids that a chat has no place for."""
    texts = [isinstance(prompt, str) for prompt in prompts]
    if all(texts):
        return []
    shown = f"({sum(texts)} texts, {len(texts) - sum(texts)} lists of token ids)"
    if any(texts):
        return [
            Fault(
                key, shown, "must all be texts, or all lists of token ids", "generate them one after another"
            )
        ]
    if chat:
        return [
            Fault(
                "chat", True, "a chat template takes texts, and the prompts are token ids", "set chat=false"
            )
        ]
    return []
