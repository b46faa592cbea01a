# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A model with early exits as lm-evaluation-harness's language model, tokenized as its own `hf` model does."""

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from tqdm import tqdm

from nemo_ee.data.chats.chat_rendering import RenderingError, render
from nemo_ee.data.token_rules import known_id
from nemo_ee.decoding.request import parse_request
from nemo_ee.errors import ConfigError, Fault, GenerationError
from nemo_ee.evaluation.harness.gen_kwargs import Generation, read_gen_kwargs
from nemo_ee.evaluation.harness.scoring import Continuation, Scored, Way, score_continuations
from nemo_ee.evaluation.teacher_forced import CONFIDENCE_RULE
from nemo_ee.generation.generating import position_limit
from nemo_ee.generation.prompts import require_chat_template

TokenizedRequest = tuple[Any, list[int], list[int]]
"""Of the harness: what its cache knows a request by, the context's tokens, and the continuation's."""


class EarlyExitLM(TemplateLM):
    """What `lm_eval.simple_evaluate(model=…)` takes.

    Generated texts are those of `model.generate`. Log-likelihoods are teacher-forced, see `score_continuations`; where
    exits are lossless, or off, they are the whole model's.

    Args:
        model: a `MegatronGPTEarlyExitModel` in one process.
        early_exit: as for `model.generate`: fields of `ExitOptions`, None for the model's own, False for full depth.
        batch_size: texts at a time.
        max_length: positions in use; None for the model's. Of what is longer the beginning is cut off.
        max_gen_toks: tokens that a request may have which gives no length.
        seed: of what is drawn, for each batch anew.

    Raises:
        ConfigError: options that break a rule, or positions that the model does not have.
    """

    def __init__(
        self,
        model: Any,
        early_exit: Mapping | bool | None = None,
        batch_size: int = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 1234,
    ):
        super().__init__()
        limit = position_limit(model.cfg)
        check_max_length(max_length, limit)
        self.model, self.early_exit, self.batch_size = model, early_exit, batch_size
        self.max_length, self.max_gen_toks, self.seed = max_length or limit, max_gen_toks, seed
        self._text = model.text_tokenizer
        self._request = parse_request(None, None, early_exit, model.early_exit)
        hugging_face = isinstance(self._text.nemo, AutoTokenizer)
        self.tokenizer = self._text.nemo.tokenizer if hugging_face else None
        """Whose chat template the harness reads; None for other libraries' tokenizers."""

    @property
    def eot_token_id(self) -> int:
        """The token that ends texts.

        Raises:
            GenerationError: the model has none.
        """
        if not self._text.eos_ids:
            raise GenerationError("the tokenizer has no end-of-text token, which the harness needs")
        return self._text.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, or the token that ends texts where there is none."""
        bos = known_id(getattr(self._text.nemo, "bos_id", None))
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; with BOS where the model's texts begin with it and this one does not yet.

        Args:
            string: a text.
            add_special_tokens: False for no BOS.
        """
        return self._text.encode(string, False if add_special_tokens is False else None)

    @cached_property
    def tokenizer_name(self) -> str:
        """By which the harness tells prompts of chats apart that it has cached: a digest of vocabulary and template."""
        names = [self._text.name(token) for token in range(self._text.vocab_size)]
        digest = hashlib.sha256(repr((names, self.chat_template(True))).encode()).hexdigest()
        return f"nemo_ee_{digest[:16]}"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, as transformers' `apply_chat_template` writes it.

        Args:
            chat_history: its turns.
            add_generation_prompt: end with what asks for an answer; else with the last turn's content, which is to be
                continued.

        Raises:
            GenerationError: there is no Hugging Face template, or it refuses the turns.
        """
        require_chat_template(self._text.nemo)
        if self.tokenizer is None:
            raise GenerationError(
                "chat: only Hugging Face tokenizers write a chat as one text; set chat=false"
            )
        try:
            text = render(self.tokenizer, chat_history, prompt=add_generation_prompt)
        except RenderingError as error:
            raise GenerationError(f"chat: the tokenizer's template refuses these turns: {error}") from error
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def _loglikelihood_tokens(
        self, requests: list[TokenizedRequest], disable_tqdm: bool = False, **_: Any
    ) -> list[Scored]:
        """See `loglikelihood` of the harness."""
        done = {index: scored for index, (scored,) in self.scores(requests, [self.way()], disable_tqdm)}
        found = [done[index] for index in range(len(requests))]
        for (text, *_), scored in zip(requests, found, strict=True):
            if text is not None:  # a piece of a longer text is nobody's
                self.cache_hook.add_partial("loglikelihood", text, scored)
        return found

    def way(self) -> Way:
        """The thresholds by which text is scored.

        Raises:
            ConfigError: exits that are sure by another rule than the probability of their token.
        """
        request = self._request
        if request.lossless or not request.asked:
            return {}
        if request.confidence != CONFIDENCE_RULE:
            rule = f"given text is scored by confidence={CONFIDENCE_RULE}"
            remedy = f"set early_exit.confidence={CONFIDENCE_RULE} and early_exit.threshold"
            raise ConfigError(Fault("early_exit.confidence", request.confidence, rule, remedy))
        return request.exits

    def scores(
        self, requests: Sequence[TokenizedRequest], ways: Sequence[Way], disable_tqdm: bool = False
    ) -> Iterator[tuple[int, list[Scored]]]:
        """Indices of requests, as they are done, and their scores in each way; contexts are cut on the left where they
        are too long, as `hf` does it."""
        texts = [self._continuation(context, said) for _, context, said in requests]
        with progress("log-likelihoods", len(requests), disable_tqdm) as bar:
            for index, scored in score_continuations(self.model, texts, ways, self.batch_size):
                yield index, scored
                bar.update()

    def _continuation(self, context: list[int], said: list[int]) -> Continuation:
        if not 1 <= len(said) <= self.max_length:
            raise GenerationError(
                f"a continuation of {len(said)} tokens: there must be 1 to max_length={self.max_length}; leave it out"
            )
        return [*context, *said][-(self.max_length + 1) :][:-1], said

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """See `LM.loglikelihood_rolling`: each text in pieces of the model's length."""
        pieces: list[TokenizedRequest] = []
        owners = []
        for index, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            for window in map(make_disjoint_window, windows):
                pieces.append((None, *window))
                owners.append(index)
        found = [0.0] * len(requests)
        for index, (logprob, _) in zip(owners, self._loglikelihood_tokens(pieces, disable_tqdm), strict=True):
            found[index] += logprob
        for request, logprob in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logprob)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `LM.generate_until`.

        Raises:
            ConfigError: keywords that decoding does not know.
        """
        found = [""] * len(requests)
        wanted = [read_gen_kwargs(request.args[1], self.max_gen_toks) for request in requests]
        prompts = [self.prompt(request.args[0], each) for request, each in zip(requests, wanted, strict=True)]
        with progress("generation", len(requests), disable_tqdm) as bar:
            for batch in self._batches(prompts, wanted):
                texts = self.answers([prompts[i] for i in batch], wanted[batch[0]])
                for i, text in zip(batch, texts, strict=True):
                    found[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                bar.update(len(batch))
        return found

    def _batches(self, prompts: Sequence[list[int]], wanted: Sequence[Generation]) -> Iterator[list[int]]:
        """Indices of requests that want the same, long prompts first."""
        kinds: dict[str, list[int]] = {}
        for i, each in enumerate(wanted):
            kinds.setdefault(repr(each), []).append(i)
        for members in kinds.values():
            members.sort(key=lambda i: len(prompts[i]), reverse=True)
            for first in range(0, len(members), self.batch_size):
                yield members[first : first + self.batch_size]

    def prompt(self, text: str, wanted: Generation) -> list[int]:
        """Token ids of a prompt, whose beginning is cut off where an answer would have no room.

        Raises:
            ConfigError: answers take all positions.
        """
        room = self.max_length - wanted.max_length
        if room < 1:
            rule = f"leaves none of {self.max_length} positions to prompts"
            raise ConfigError(Fault("gen_kwargs.max_gen_toks", wanted.max_length, rule, "use less"))
        return self.tok_encode(text)[-room:]

    def answers(self, prompts: Sequence[list[int]], wanted: Generation) -> list[str]:
        """Texts behind prompts, each cut in front of the first text that ends it."""
        output = self.generate(prompts, wanted, self.early_exit)
        return [
            self.cut(ids[len(prompt) :], wanted)
            for prompt, ids in zip(prompts, output["token_ids"], strict=True)
        ]

    def generate(
        self, prompts: Sequence[list[int]], wanted: Generation, early_exit: Mapping | bool | None
    ) -> dict[str, Any]:
        """`model.generate`."""
        sampling = {**wanted.sampling, "end_strings": list(wanted.until)}
        generator = None if sampling["use_greedy"] else torch.Generator().manual_seed(self.seed)
        how = {"early_exit": early_exit, "generator": generator}
        return self.model.generate(list(prompts), wanted.lengths, sampling, **how)

    def cut(self, tokens: list[int], wanted: Generation) -> str:
        """The text of generated tokens as `hf` cuts it."""
        ends = [*wanted.until, self._text.name(self.eot_token_id)]
        return postprocess_generated_text(self._text.decode(tokens), ends, None)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness notes of the model beside its results."""
        return {"model_num_layers": self.model.cfg.num_layers, "early_exit": self.early_exit}


def check_max_length(max_length: int | None, limit: int) -> None:
    """Raises ConfigError unless there are so many positions; None means all."""
    if max_length is not None and not 1 <= max_length <= limit:
        rule = f"must be 1 to the model's {limit} positions"
        raise ConfigError(Fault("max_length", max_length, rule, f"use {limit}, or null"))


def progress(what: str, total: int, disable: bool = False) -> tqdm:
    """A bar on the terminal; use it as a context."""
    return tqdm(total=total, file=sys.stderr, desc=what, dynamic_ncols=True, disable=disable)
