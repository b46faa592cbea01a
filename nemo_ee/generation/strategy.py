# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Early exits inside NeMo's own generation loop, as a text generation strategy."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.collections.nlp.modules.common.text_generation_strategy import GPTModelTextGenerationStrategy
from nemo.utils import logging
from nemo.utils.nemo_logging import LogMode
from torch import Tensor

from nemo_ee.decoding.decoder import EarlyExitDecoder
from nemo_ee.decoding.generated_sequence import GeneratedSequence
from nemo_ee.decoding.leaving import NEVER, is_asked
from nemo_ee.decoding.logits_processing import TokenSlot
from nemo_ee.decoding.request import GenerationRequest, parse_exits
from nemo_ee.decoding.step import UNANSWERED, Step
from nemo_ee.errors import ConfigError, Fault, GenerationError
from nemo_ee.generation.generating import (
    check_model_can_generate,
    check_one_stage,
    generating,
    position_limit,
)
from nemo_ee.generation.prompts import tokenize_prompts
from nemo_ee.generation.stopping import StopRule
from nemo_ee.runtime.collective import on_first_rank


class EarlyExitTextGenerationStrategy(GPTModelTextGenerationStrategy):
    """For `model.generate(inputs, length_params, sampling_params, strategy=…)` of an early-exit model.

    NeMo's loop starts at the end of the shortest prompt and feeds the rest of longer ones token by token;
    those tokens, like the prompts themselves, go through all layers. It generates until the longest prompt
    has `max_length` tokens more, so shorter prompts get more than that. End strings count in generated text
    only.

    The output has `early_exit`: per sentence the `exit_layers` and `confidences` of the tokens generated up
    to its end; `num_layers` stands for the final exit.

    Args:
        model: a `MegatronGPTEarlyExitModel` on one pipeline stage.
        threshold: as `early_exit.threshold` of `model.generate`.
        exits: exit layers in use; None for the model's default.
        max_pending: see `EarlyExitDecoder.step`.
        confidence: the rule by which exits are sure; None for the model's default.

    Raises:
        ConfigError: options that break a rule.
        GenerationError: a model that cannot be served.
    """

    def __init__(
        self,
        model: Any,
        threshold: float | list[float] | None = None,
        exits: list[int] | None = None,
        max_pending: int | None = None,
        confidence: str | None = None,
    ):
        check_model_can_generate(model)
        check_one_stage(model)
        faults: list[Fault] = []
        options = {
            "threshold": threshold,
            "exits": exits,
            "max_pending": max_pending,
            "confidence": confidence,
        }
        thresholds, others = parse_exits(options, model.early_exit, faults)
        if faults:
            raise ConfigError(*faults)
        self.exits = {n: value for n, value in thresholds.items() if is_asked(value)}
        self.max_pending = others.max_pending
        self.confidence = others.confidence or model.early_exit.inference.confidence
        super().__init__(model)
        self.prompt_logits = True
        self.decoder: EarlyExitDecoder | None = None
        self._prompt_lengths: list[int] | None = None
        self._min_length = 0

    def prepare(self, inputs: Any, length_params: Mapping, sampling_params: Mapping) -> tuple[Tensor, Tensor]:
        """Tells what NeMo's loop does not: prompts' lengths, the least length, and whether it reads the logits of
        prompt tokens. `model.generate` calls it on all ranks; without it prompts must be texts.

        Args:
            inputs: see `tokenize_prompts`.
            length_params: all of NeMo's.
            sampling_params: all of NeMo's; `add_BOS` may be None, for the model's rule.

        Returns:
            What to hand to NeMo's loop: tensors are taken as they are, and all else becomes token ids
            [B, longest prompt + max_length] and lengths [B]. (With `compute_logprob` that loop cuts texts to their
            length without BOS.)

        Raises:
            ConfigError: log-probabilities that NeMo's loop does not give.
            GenerationError: see `tokenize_prompts`; on every rank, where NeMo's loop would raise it on the first
                and leave the others waiting.
        """
        self.prompt_logits = bool(sampling_params["compute_logprob"])
        if sampling_params["all_probs"] and not self.prompt_logits:
            rule = "NeMo's loop has no probabilities of generated tokens"
            raise ConfigError(
                Fault("sampling_params.all_probs", True, rule, "call model.generate without a strategy")
            )
        self._min_length = length_params["min_length"]
        self.model.start_distributed()
        prompts = on_first_rank(
            lambda: self._tokenize(inputs, sampling_params["add_BOS"]),
            parallel_state.get_model_parallel_group(),
        )
        self._prompt_lengths = [len(prompt) for prompt in prompts]
        if isinstance(inputs, tuple) and isinstance(inputs[0], Tensor):
            return inputs
        return self._padded(prompts, 1 if self.prompt_logits else length_params["max_length"])

    def _tokenize(self, inputs: Any, add_bos: bool | None) -> list[list[int]]:
        return tokenize_prompts(inputs, self.model.text_tokenizer, add_bos, position_limit(self.model.cfg))

    def tokenize_batch(self, sentences: Any, max_len: int, add_BOS: bool) -> tuple[Tensor, Tensor]:
        """Token ids [B, longest prompt + max_len], clipped and padded with EOS, and lengths [B].

        Raises:
            GenerationError: see `tokenize_prompts`.
        """
        prompts = self._tokenize(sentences, add_BOS)
        self._prompt_lengths = [len(prompt) for prompt in prompts]
        return self._padded(prompts, max_len)

    def _padded(self, prompts: list[list[int]], max_len: int) -> tuple[Tensor, Tensor]:
        lengths = [len(prompt) for prompt in prompts]
        padding = (*self.model.text_tokenizer.eos_ids, 0)[0]
        width, device = self.clip_max_len(max(lengths) + max_len), self.model.gpt.output_weight().device
        padded = [prompt + [padding] * (width - len(prompt)) for prompt in prompts]
        return torch.tensor(padded, device=device), torch.tensor(lengths, device=device)

    def clip_max_len(self, maxlen: int) -> int:
        """At most one token more than the model has positions; warns of less than was asked for."""
        limit = position_limit(self.model.cfg)
        if maxlen > limit + 1:
            logging.warning(
                f"length_params.max_length: cut at the model's {limit} positions", mode=LogMode.ONCE
            )
        return min(maxlen, limit + 1)

    def init_batch(self, context_tokens: Tensor, context_length: int, compute_attention_mask: bool) -> None:
        """Starts a batch. Collectives: at TP > 1 a broadcast of the prompts' lengths [B]."""
        batch, known = len(context_tokens), self._prompt_lengths
        lengths = torch.tensor(
            known if known and len(known) == batch else [0] * batch, device=context_tokens.device
        )
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            source = parallel_state.get_tensor_model_parallel_src_rank()
            torch.distributed.broadcast(
                lengths, source, group=parallel_state.get_tensor_model_parallel_group()
            )
        self.lengths = lengths.tolist()
        if not all(self.lengths):
            raise GenerationError(
                "prompts given as tensors have unknown lengths here; call model.generate(…, strategy=…)"
            )
        prompts = zip(context_tokens.tolist(), self.lengths, strict=True)
        self._prompts = [tokens[:length] for tokens, length in prompts]
        self.sequences: list[GeneratedSequence] = []
        self._exits = [(UNANSWERED, 0.0)] * batch
        self.forget()

    def prepare_batch_at_step(
        self,
        tokens: Tensor,
        maxlen: int,
        micro_batch_size: int,
        step: int,
        context_length: int,
        compute_attention_mask: bool = True,
    ) -> tuple[list[Any], list[int]]:
        """What `forward_step` needs: the text so far, its length, and the length to reserve.

        Raises:
            GenerationError: prompts given as a tensor without room for what is generated.
        """
        if tokens.shape[1] < maxlen:
            raise GenerationError(
                f"inputs: token ids of shape {list(tokens.shape)}; NeMo's loop writes into them and needs "
                f"{maxlen} columns here: pad them, or call model.generate without a strategy"
            )
        shape = [1, micro_batch_size, self.model.cfg.hidden_size]
        return [tokens, context_length, maxlen], shape

    def forward_step(self, batch: list[Any], tensor_shape: list[int]) -> list[dict[str, Tensor]]:
        """Feeds the new tokens and returns logits [B, S, Vp/TP], S = 1 or all the prompts' first tokens.

        Logits of tokens that the exit cannot emit are -inf, and those of tokens that end texts while one is too short;
        of the latter NeMo's loop knows a single one.
        """
        tokens, length, maxlen = batch
        gpt, first = self.model.gpt, self.decoder is None
        shard, ends = len(gpt.output_weight()), self.model.text_tokenizer.eos_ids
        short = [length - start < self._min_length for start in self.lengths]
        slots = [TokenSlot(ends if each else (), greedy=False) for each in short]
        with generating(self.model, torch.no_grad):
            if self.decoder is None:
                self.decoder = EarlyExitDecoder(
                    self.model.decoding_model(),
                    list(self.exits),
                    len(tokens),
                    maxlen,
                    confidence=self.confidence,
                )
                rows = list(range(len(tokens)))
                step = self.decoder.prefill(
                    tokens[:, :length].tolist(), self.prompt_logits, None if self.prompt_logits else slots
                )
                logits = step.vocabulary_shard(shard).view(len(tokens), -1, shard)
            else:
                rows = [b for b, sequence in enumerate(self.sequences) if sequence.finish_reason is None]
                never, usual = [NEVER] * len(self.exits), list(self.exits.values())
                thresholds = [usual if length > self.lengths[b] else never for b in rows]
                limits = [self.max_pending] * len(rows)
                places = [slots[b] for b in rows]
                step = self.decoder.step(tokens[rows, length - 1], thresholds, rows, limits, slots=places)
                logits = step.vocabulary_shard(shard)[:, None]
        if len(rows) < len(tokens):
            whole = logits.new_zeros(len(tokens), 1, shard)
            whole[rows] = logits
            logits = whole
        self._note(step, rows, last=length if first and self.prompt_logits else 1)
        return [{"logits": logits}]

    def _note(self, step: Step, rows: list[int], last: int) -> None:
        """Remembers the exits of the tokens about to be chosen; each of `rows` has `last` predictions."""
        for i, b in enumerate(rows):
            at = (i + 1) * last - 1
            self._exits[b] = step.exit_layers[at], step.confidences[at]

    def end_of_generation_condition(
        self, tokens: Tensor, prev: Tensor, eod_id: int, end_strings: list[str]
    ) -> Tensor:
        """Which sequences have ended, [B] bool; those are not computed further."""
        self.sequences = self.sequences or self._begun(end_strings)
        for row, sequence, exit_ in zip(tokens.tolist(), self.sequences, self._exits, strict=True):
            if len(row) > len(sequence.prompt) and sequence.finish_reason is None:
                sequence.commit(row[-1], *exit_)
        return torch.tensor([s.finish_reason is not None for s in self.sequences], device=prev.device)

    def _begun(self, end_strings: list[str]) -> list[GeneratedSequence]:
        stop, request = StopRule(self.model.text_tokenizer, end_strings), GenerationRequest()
        return [stop.begin(prompt, request, sys.maxsize) for prompt in self._prompts]

    def post_generation_process(self, output: dict[str, Any]) -> dict[str, Any]:
        """Adds `early_exit` and `finish_reason`, writes `sentences` as we decode them, and forgets the batch."""
        decode = self.model.text_tokenizer.decode
        output["sentences"] = [decode(ids) for ids in output["token_ids"]]
        sequences = self.sequences or self._begun([])
        if not self.prompt_logits:
            output["finish_reason"] = [sequence.finish_reason or "length" for sequence in sequences]
        output["early_exit"] = [
            {"exit_layers": sequence.exit_layers, "confidences": sequence.confidences}
            for sequence in sequences
        ]
        self.forget()
        self._prompt_lengths, self.prompt_logits, self._min_length = None, True, 0
        return output

    def forget(self) -> None:
        """Gives back what a batch has borrowed of the model, however it ended; `model.generate` calls it."""
        if self.decoder is not None:
            self.decoder.close()
        self.decoder = None
