# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The ways of decoding.py to continue the same prompts with the same weights: ours, NeMo's, Hugging Face's.

All are greedy, and none may emit EOS before the last token.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from unittest.mock import patch

import torch
from decoding_passes import Pass, counted, synchronise
from nemo.collections.nlp.modules.common.text_generation_strategy import GPTModelTextGenerationStrategy
from transformers import AutoModelForCausalLM, StoppingCriteria

from nemo_ee.inference.generate import continue_sequences, generating
from nemo_ee.inference.request import parse_request
from nemo_ee.inference.sequence import Sequence as Continued
from nemo_ee.inference.stopping import END_OF_SEQUENCE, StopRule
from nemo_ee.megatron.decoding_model import DecodingModel

FULL, EXITS, LOSSLESS, INT8 = "full depth", "early exit", "lossless", "int8"
BF16, BF16_LOSSLESS = "full depth, bf16", "lossless, bf16"
ROUNDED = (INT8, BF16, BF16_LOSSLESS)
"""Ways whose weights differ from the model's, unless it has bfloat16's numbers."""
NEMO, HUGGING_FACE, ASSISTED = "NeMo", "Hugging Face", "Hugging Face, assistant_early_exit"
SAMPLING = {"use_greedy": True, "add_BOS": False, "end_strings": [END_OF_SEQUENCE]}
Tokens = list[list[int]]


class Clock:
    """Times a call, and notes when its first tokens are known.

    All ways ask a stopping condition after every token; the first question is the time to first token.

    Attributes:
        passes: what our decoder ran after that, see `decoding_passes`.
        first: seconds to the first token.
        first_tokens: how many tokens each sequence had then; speculation may bring several.
        drafts: that our lossless decoding proposed.
        accepted: of them, those that the full model confirmed.
    """

    def __init__(self) -> None:
        self.passes: Counter[Pass] = Counter()
        self.first, self.first_tokens = 0.0, 0
        self.drafts = self.accepted = 0
        synchronise()
        self._begin = time.perf_counter()

    def mark(self, tokens: int) -> None:
        """Some sequence has this many new tokens."""
        if not self.first_tokens:
            synchronise()
            self.first, self.first_tokens = time.perf_counter() - self._begin, tokens
            self.passes.clear()

    def seconds(self) -> float:
        """Since the call began."""
        synchronise()
        return time.perf_counter() - self._begin


class Generate(Protocol):
    """Continues prompts of one length by `count` tokens each; returns those."""

    def __call__(self, prompts: Tokens, count: int, clock: Clock) -> Tokens: ...


@dataclass(frozen=True)
class Way:
    """One row of a table.

    Attributes:
        kind: one of this file's names.
        threshold: of its exits, or None.
        generate: what is timed.
        parameters: bytes of the weights that it uses.
    """

    kind: str
    threshold: float | None
    generate: Generate
    parameters: int

    @property
    def name(self) -> str:
        return self.kind if self.threshold is None else f"{self.kind}, {self.threshold:g}"


class Ours:
    """`model.generate` with the early-exit options given; False for full depth."""

    def __init__(self, model: Any, early_exit: dict | bool):
        self.model, self.early_exit = model, early_exit

    def __call__(self, prompts: Tokens, count: int, clock: Clock) -> Tokens:
        inputs = torch.tensor(prompts), torch.tensor([len(prompt) for prompt in prompts])
        with marked(clock), counted(clock.passes):
            output = self.model.generate(inputs, lengths(count), SAMPLING, early_exit=self.early_exit)
        for each in output["early_exit"]:
            clock.drafts += each["drafts"]
            clock.accepted += each["accepted"]
        return [ids[len(prompt) :] for ids, prompt in zip(output["token_ids"], prompts, strict=True)]


class OurWeights:
    """Ours with weights in another format, which are made in the first call and kept.

    Args:
        model: a `MegatronGPTEarlyExitModel`.
        weights: see `nemo_ee.megatron.lean_weights.WEIGHT_KINDS`.
        early_exit: as for `model.generate`.
    """

    def __init__(self, model: Any, weights: str, early_exit: dict | bool = False):
        self.model, self.weights, self.early_exit = model, weights, early_exit
        self._decoding: DecodingModel | None = None

    def __call__(self, prompts: Tokens, count: int, clock: Clock) -> Tokens:
        request = parse_request(lengths(count), SAMPLING, self.early_exit, self.model.early_exit)
        stop = StopRule(self.model.text_tokenizer, SAMPLING["end_strings"])
        with generating(self.model), marked(clock):
            if self._decoding is None:
                self._decoding = DecodingModel(self.model.gpt, self.weights)
            sequences = [Continued(prompt, request, stop, stop.eos, count) for prompt in prompts]
            continue_sequences(self._decoding, sequences)
        for sequence in sequences:
            clock.drafts += sequence.statistics.drafts
            clock.accepted += sequence.statistics.accepted
        return [sequence.tokens for sequence in sequences]


@contextmanager
def marked(clock: Clock) -> Iterator[None]:
    """Tells the clock of every token of ours."""
    stops = StopRule.__call__

    def asked(rule: StopRule, generated: Sequence[int]) -> bool:
        clock.mark(len(generated))
        return stops(rule, generated)

    with patch.object(StopRule, "__call__", asked):
        yield


def lengths(count: int) -> dict[str, int]:
    """NeMo's parameters for that many tokens exactly."""
    return {"max_length": count, "min_length": count}


class NeMo:
    """NeMo's own loop and strategy on our model, at full depth."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, prompts: Tokens, count: int, clock: Clock) -> Tokens:
        width = len(prompts[0])

        class Marked(GPTModelTextGenerationStrategy):
            def end_of_generation_condition(self, tokens: torch.Tensor, *others: Any) -> torch.Tensor:
                clock.mark(tokens.shape[1] - width)
                return super().end_of_generation_condition(tokens, *others)

        # NeMo writes new tokens behind the prompts, into the tensor that it is given.
        device = self.model.gpt.output_weight().device
        ids = torch.full((len(prompts), width + count), self.model.tokenizer.eos_id, device=device)
        ids[:, :width] = torch.tensor(prompts, device=device)
        output = self.model.generate(
            (ids, torch.full((len(prompts),), width, device=device)),
            lengths(count),
            SAMPLING,
            strategy=Marked(self.model),
        )
        return [list(map(int, row[width:])) for row in output["token_ids"]]


class HuggingFace:
    """`generate` of transformers.

    Args:
        model: with `LlamaForCausalLM`'s interface.
        assistant_early_exit: the layer that drafts tokens for the whole model, or None.
    """

    def __init__(self, model: Any, assistant_early_exit: int | None = None):
        self.model = model
        self.more = {} if assistant_early_exit is None else {"assistant_early_exit": assistant_early_exit}

    def __call__(self, prompts: Tokens, count: int, clock: Clock) -> Tokens:
        width = len(prompts[0])

        class Marked(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
                clock.mark(input_ids.shape[1] - width)
                return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        ids = torch.tensor(prompts, device=self.model.device)
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            stopping_criteria=[Marked()],
            **self.more,
        )
        return output[:, width:].tolist()


def all_ways(model: Any, other: Any, thresholds: Sequence[float], assistant_early_exit: int) -> list[Way]:
    """Every way, ours first.

    Args:
        model: a `MegatronGPTEarlyExitModel` with exits.
        other: Hugging Face's, of the same weights.
        thresholds: of our exits.
        assistant_early_exit: Hugging Face's drafting layer.
    """
    exits = list(model.early_exit.layers)
    with_exits = size(model.gpt)
    plain = with_exits - size(model.gpt.exits)
    ways = [
        Way(FULL, None, Ours(model, False), plain),
        Way(BF16, None, OurWeights(model, "bf16"), plain),
        Way(INT8, None, OurWeights(model, "int8"), plain),
    ]
    for kind, more in ((EXITS, {}), (LOSSLESS, {"lossless": True})):
        settings = ({"threshold": threshold, "exits": exits, **more} for threshold in thresholds)
        ways += [Way(kind, each["threshold"], Ours(model, each), with_exits) for each in settings]
        if kind == LOSSLESS:
            for threshold in sorted(thresholds)[:2]:
                options = {"threshold": threshold, "exits": exits, **more}
                ways.append(Way(BF16_LOSSLESS, threshold, OurWeights(model, "bf16", options), with_exits))
    return [
        *ways,
        Way(NEMO, None, NeMo(model), plain),
        Way(HUGGING_FACE, None, HuggingFace(other), size(other)),
        Way(ASSISTED, None, HuggingFace(other, assistant_early_exit), size(other)),
    ]


def load_hugging_face(path: str, dtype: torch.dtype) -> Any:
    """The model of a directory in eval mode, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=dtype, attn_implementation="sdpa")
    return model.eval().to(device)


def size(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters; shared ones count once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
