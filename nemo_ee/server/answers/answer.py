# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Answers in OpenAI's form, with the exit of every token."""

import secrets
import time
from collections.abc import Iterable
from typing import Any

from nemo_ee.decoding.generated_sequence import SequenceStatistics
from nemo_ee.server.answers.delta import Delta
from nemo_ee.server.answers.logprobs import Spell, of_chat, of_completion
from nemo_ee.server.requests.plan import RequestPlan

Json = dict[str, Any]


class Answer:
    """The answer to one request of `/v1/completions`.

    Args:
        model: its name.
        num_layers: of the model.
        plan: the request's.
        spell: the bytes of a token.
        include_usage: chunks have a `usage`: null, but for the last one.
    """

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, model: str, num_layers: int, plan: RequestPlan, spell: Spell, include_usage: bool = False
    ):
        self._model, self._num_layers, self._plan, self._spell = model, num_layers, plan, spell
        self.include_usage = include_usage
        self._id, self._created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())
        self._generated, self._totals = 0, SequenceStatistics()
        self._written = [0] * len(plan.choices)

    def whole(self, choices: dict[int, Delta]) -> Json:
        """The answer to a request without a stream."""
        for delta in choices.values():
            self._count(delta)
        body = [
            self._choice(i, self._text(i, delta, begins=True), delta) for i, delta in sorted(choices.items())
        ]
        return {**self._envelope(self.kind), "choices": body, "usage": self.usage()}

    def opening(self) -> Iterable[Json]:
        """The chunks of a stream that come before any token; a prompt that is scored comes with the first one."""
        for i in range(len(self._plan.choices)):
            if self._echo(i) and not self._plan.offsets:
                yield self._chunk(self._part(i, self._echo(i), Delta()))

    def chunk(self, index: int, delta: Delta) -> Json:
        """A chunk of a stream: tokens of one choice."""
        self._count(delta)
        return self._chunk(self._part(index, self._text(index, delta, bool(delta.prompt_logprobs)), delta))

    def usage_chunk(self) -> Json:
        """The last chunk of a stream, if usage is asked for."""
        return {**self._envelope(self.chunk_kind), "choices": [], "usage": self.usage()}

    def usage(self) -> Json:
        """Tokens, and in `early_exit` what they cost.

        `layers_run` counts passes of one token through one layer, `full_depth_layers` those that all layers for
        all tokens would have taken; `drafts` and `accepted` are those of lossless decoding.
        """
        prompt, n = sum(map(len, self._plan.prompts)), len(self._plan.choices) // len(self._plan.prompts)
        unfed = sum(choice.limit > 0 for choice in self._plan.choices)  # the last token of each
        fed = n * prompt + self._generated - unfed
        cost = {
            "layers_run": self._totals.layers_run,
            "full_depth_layers": fed * self._num_layers,
            "drafts": self._totals.drafts,
            "accepted": self._totals.accepted,
        }
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._generated,
            "total_tokens": prompt + self._generated,
            "early_exit": cost,
        }

    def _choice(self, index: int, text: str, delta: Delta) -> Json:
        return {**self._frame(index, delta), "text": text}

    def _part(self, index: int, text: str, delta: Delta) -> Json:
        return self._choice(index, text, delta)

    def _frame(self, index: int, delta: Delta) -> Json:
        exits = {"tokens": delta.pieces, "exit_layers": delta.exit_layers, "confidences": delta.confidences}
        told = self._logprobs(index, delta) if delta.logprobs or delta.prompt_logprobs else None
        return {"index": index, "logprobs": told, "finish_reason": delta.finish_reason, "early_exit": exits}

    def _logprobs(self, index: int, delta: Delta) -> Json:
        tokens, offsets = [each.token for each in delta.logprobs], []
        if delta.prompt_logprobs:
            place = self._place(index)
            tokens, offsets = self._plan.prompts[place] + tokens, list(self._plan.offsets[place])
            self._written[index] = len(self._plan.echo[place])
        for piece in delta.pieces:
            offsets.append(self._written[index])
            self._written[index] += len(piece)
        return of_completion([*delta.prompt_logprobs, *delta.logprobs], tokens, offsets, self._spell)

    def _text(self, index: int, delta: Delta, begins: bool) -> str:
        return (self._echo(index) if begins else "") + delta.text

    def _echo(self, index: int) -> str:
        return self._plan.echo[self._place(index)]

    def _place(self, index: int) -> int:
        """Of a choice's prompt among all."""
        return index * len(self._plan.prompts) // len(self._plan.choices)

    def _chunk(self, choice: Json) -> Json:
        usage = {"usage": None} if self.include_usage else {}
        return {**self._envelope(self.chunk_kind), "choices": [choice], **usage}

    def _envelope(self, kind: str) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _count(self, delta: Delta) -> None:
        self._generated += len(delta.pieces)
        if delta.statistics is not None:
            self._totals.layers_run += delta.statistics.layers_run
            self._totals.drafts += delta.statistics.drafts
            self._totals.accepted += delta.statistics.accepted


class ChatAnswer(Answer):
    """The answer to one request of `/v1/chat/completions`."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> Iterable[Json]:
        """One chunk per choice says who speaks."""
        for i in range(len(self._plan.choices)):
            part = self._frame(i, Delta())
            yield self._chunk({**part, "delta": {"role": "assistant", "content": ""}})

    def _logprobs(self, index: int, delta: Delta) -> Json:
        return of_chat(delta.logprobs, self._spell)

    def _choice(self, index: int, text: str, delta: Delta) -> Json:
        return {**self._frame(index, delta), "message": {"role": "assistant", "content": text}}

    def _part(self, index: int, text: str, delta: Delta) -> Json:
        return {**self._frame(index, delta), "delta": {"content": text}}
