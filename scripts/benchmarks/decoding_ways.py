# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Ways to continue the same prompts with the same weights: ours, which go on behind an EOS; NeMo's and Hugging Face's,
which may not say it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from harness import synchronise
from nemo.collections.nlp.modules.common.text_generation_strategy import GPTModelTextGenerationStrategy
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, StoppingCriteria

from nemo_ee.decoding.decoding_model import DecodingModel
from nemo_ee.decoding.generated_sequence import GeneratedSequence
from nemo_ee.decoding.request import parse_request
from nemo_ee.decoding.session import DecodingSession
from nemo_ee.errors import CheckpointError, GenerationError
from nemo_ee.generation.generating import generating, position_limit
from nemo_ee.models.runs.trainer_builder import EarlyExitTrainerBuilder
from nemo_ee.running.restore import restore_model

Tokens = list[list[int]]
FULL, EXITS, LOSSLESS, NEMO, HUGGING_FACE = "full depth", "early exit", "lossless", "NeMo", "Hugging Face"
NATIVE, BF16, INT8 = {"weights": "native"}, {"weights": "bf16"}, {"weights": "int8"}
WHOLE = {"output_layer": "full"}
KINDS: dict[str, tuple[dict, dict | None]] = {
    FULL: (NATIVE, None),
    f"{FULL}, bf16": (BF16, None),
    "int8": (INT8, None),
    EXITS: (NATIVE, {}),
    LOSSLESS: (NATIVE, {"lossless": True}),
    f"{LOSSLESS}, bf16": (BF16, {"lossless": True}),
}
"""Our ways -> how decoding is prepared (see `prepare_decoding`), and their exits' options besides a threshold."""
PAIRED = KINDS | {
    f"{FULL}, whole output layer": (NATIVE | WHOLE, None),
    f"{FULL}, bf16, whole output layer": (BF16 | WHOLE, None),
    f"{EXITS}, bf16": (BF16, {}),
    f"{EXITS}, always": (NATIVE, {"always": True}),
}
"""And more, for pairs."""
SAMPLING = {"use_greedy": True, "add_BOS": False, "end_strings": ["<|endoftext|>"]}
TOP_P = {**SAMPLING, "use_greedy": False, "temperature": 1.0, "top_k": 0, "top_p": 0.9}
SAMPLINGS = {"greedy": SAMPLING, "top-p 0.9": TOP_P}


class Clock:
    """Times a call, and notes the seconds to its first tokens, and how many each sequence had then."""

    def __init__(self) -> None:
        self.first, self.first_tokens = 0.0, 0
        synchronise()
        self._begin = time.perf_counter()

    def mark(self, tokens: int) -> None:
        """Some sequence has this many new tokens."""
        if not self.first_tokens:
            self.first, self.first_tokens = self.seconds(), tokens

    def seconds(self) -> float:
        """Since the call began."""
        synchronise()
        return time.perf_counter() - self._begin


class Prepared:
    """A model's weights made ready for decoding, each kind once, for so many sequences and positions of each."""

    def __init__(self, model: Any, rows: int, length: int):
        self.model, self._size = model, {"rows": rows, "max_length": length}
        self.of = cache(self._made)

    def _made(self, **how: str) -> DecodingModel:
        self.model.prepare_decoding(**how, **self._size)
        with generating(self.model):
            made = self.model.decoding_model()
        self.model.release_decoding()
        return made


class Ours:
    """Our decoder, on weights that are ready; `session` and `sequences` are those of the last call.

    Args:
        model: a `MegatronGPTEarlyExitModel`.
        decoding: returns what `prepare_decoding` has made.
        early_exit: as for `model.generate`; False for full depth.
        sampling: likewise.
        policy: when exits are asked and draft, in place of the session's own.
    """

    session: DecodingSession
    sequences: list[GeneratedSequence]

    def __init__(
        self, model: Any, decoding: Callable, early_exit: Any, sampling: dict = SAMPLING, policy: Any = None
    ):
        self._model, self._decoding, self._early_exit = model, decoding, early_exit
        self._sampling, self._policy = sampling, policy

    @contextmanager
    def begun(self, prompts: Tokens, count: int) -> Iterator[None]:
        """Prompts fed, and the first token of each chosen; under `generating`."""
        # EOS ends nothing here: to keep it from coming would change every token's logits, which a usual call does not.
        request = parse_request(
            {"max_length": count}, self._sampling, self._early_exit, self._model.early_exit
        )
        exits = request.asked
        of = request, frozenset(), self._model.text_tokenizer.eos_ids, count
        self.sequences = [GeneratedSequence(prompt, *of, seed) for seed, prompt in enumerate(prompts)]
        size = exits, len(prompts), len(prompts[0]) + count - 1, request.kv_policy, request.confidence
        with (
            generating(self._model),
            DecodingSession(self._decoding(), *size, self._policy) as self.session,
        ):
            self.session.add(self.sequences)
            yield

    def advance(self) -> None:
        """Until some sequence has more tokens: a step, or all of a round of drafts."""
        known = sum(len(each.tokens) for each in self.sequences)
        while self.session.running and sum(len(each.tokens) for each in self.sequences) == known:
            self.session.step()

    def __call__(self, prompts: Tokens, count: int, clock: Clock) -> Tokens:
        with self.begun(prompts, count):
            clock.mark(1)
            while self.session.running:
                self.session.step()
        return [sequence.tokens for sequence in self.sequences]


class NeMo:
    """NeMo's own loop and strategy on our model, at full depth."""

    def __init__(self, model: Any):
        self._model = model

    def __call__(self, prompts: Tokens, count: int, clock: Clock) -> Tokens:
        width = len(prompts[0])

        class Marked(GPTModelTextGenerationStrategy):
            def end_of_generation_condition(self, tokens: torch.Tensor, *others: Any) -> torch.Tensor:
                clock.mark(tokens.shape[1] - width)
                return super().end_of_generation_condition(tokens, *others)

        # NeMo writes new tokens behind the prompts, into the tensor that it is given.
        device = self._model.gpt.output_weight().device
        ids = torch.full((len(prompts), width + count), self._model.tokenizer.eos_id, device=device)
        ids[:, :width] = torch.tensor(prompts, device=device)
        given = ids, torch.full((len(prompts),), width, device=device)
        lengths = {"max_length": count, "min_length": count}
        output = self._model.generate(given, lengths, SAMPLING, strategy=Marked(self._model))
        return [list(map(int, row[width:])) for row in output["token_ids"]]


class HuggingFace:
    """`generate` of transformers, on a model with `LlamaForCausalLM`'s interface."""

    def __init__(self, model: Any, sampling: dict = SAMPLING):
        self._model, self._how = model, {"do_sample": not sampling["use_greedy"]}
        self._how |= {key: sampling[key] for key in ("temperature", "top_k", "top_p") if key in sampling}

    def __call__(self, prompts: Tokens, count: int, clock: Clock) -> Tokens:
        width = len(prompts[0])

        class Marked(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
                clock.mark(input_ids.shape[1] - width)
                return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        ids = torch.tensor(prompts, device=self._model.device)
        how = {"max_new_tokens": count, "min_new_tokens": count, "stopping_criteria": [Marked()], **self._how}
        return self._model.generate(ids, attention_mask=torch.ones_like(ids), **how)[:, width:].tolist()


def our_way(prepared: Prepared, kind: str, threshold: Any = None, sampling: str = "greedy") -> Ours:
    """A way of `PAIRED`; the threshold is one for all exits, or a list."""
    (how, options), exits = PAIRED[kind], False
    if options is not None:
        exits = {"exits": list(prepared.model.early_exit.layers), "threshold": threshold, **options}
    return Ours(prepared.model, lambda: prepared.of(**how), exits, SAMPLINGS[sampling])


def restore(model: str, adapter: str | None, precision: str, longest: int) -> Any:
    """Our model with its exits, all of its files read; raises CheckpointError for one without exits or exits of another
    base, GenerationError where texts of `longest` tokens are longer than the model can read."""
    kind = 32 if precision == "32" else "bf16"
    trainer = {"devices": 1, "num_nodes": 1, "precision": kind, "logger": False}
    trainer |= {"enable_checkpointing": False, "enable_progress_bar": False}
    built = EarlyExitTrainerBuilder(OmegaConf.create({"trainer": trainer, "model": {"precision": kind}}))
    run = built.create_trainer()
    ours = restore_model(model, adapter, run, {"precision": run.precision, "megatron_amp_O2": kind == "bf16"})
    if not ours.early_exit.layers:
        raise CheckpointError(f"--model {model}: it has no exits; give --adapter")
    if longest > (limit := position_limit(ours.cfg)):
        raise GenerationError(f"--prompts with --new-tokens: the model has {limit} positions")
    return read(ours)


def load_hugging_face(path: str, dtype: torch.dtype) -> Any:
    """The model of a directory in eval mode, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=dtype, attn_implementation="sdpa")
    return read(model.eval().to(device))


def read(model: Any) -> Any:
    """Reads files that are mapped into memory now, not in a call that is measured; returns the model."""
    for each in model.parameters():
        each.sum()
    return model
