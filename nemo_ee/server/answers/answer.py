# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Answers in OpenAI's form, with the exit of every token."""

import secrets
import time
from collections.abc import Iterable
from typing import Any

from nemo_ee.decoding.generated_sequence import SequenceStatistics
from nemo_ee.server.answers.delta import Delta
from nemo_ee.server.requests.plan import RequestPlan

Json = dict[str, Any]


class Answer:
    """The answer to one request of `/v1/completions`.

    Args:
        model: its name.
        num_layers: of the model.
        plan: the request's.
    """

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, num_layers: int, plan: RequestPlan):
        self._model, self._num_layers, self._plan = model, num_layers, plan
        self._id, self._created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())
        self._generated, self._totals = 0, SequenceStatistics()

    def whole(self, choices: dict[int, Delta]) -> Json:
        """The answer to a request without a stream."""
        for delta in choices.values():
            self._count(delta)
        body = [self._choice(i, self._echo(i) + delta.text, delta) for i, delta in sorted(choices.items())]
        return {**self._envelope(self.kind), "choices": body, "usage": self.usage()}

    def opening(self) -> Iterable[Json]:
        """The chunks of a stream that come before any token."""
        for i in range(len(self._plan.choices)):
            if self._echo(i):
                yield self._chunk(self._part(i, self._echo(i), Delta()))

    def chunk(self, index: int, delta: Delta) -> Json:
        """A chunk of a stream: tokens of one choice."""
        self._count(delta)
        return self._chunk(self._part(index, delta.text, delta))

    def usage_chunk(self) -> Json:
        """The last chunk of a stream, if usage is asked for."""
        return {**self._envelope(self.chunk_kind), "choices": [], "usage": self.usage()}

    def usage(self) -> Json:
        """Tokens, and in `early_exit` what they cost.

        `layers_run` counts passes of one token through one layer, `full_depth_layers` those that all layers for
        all tokens would have taken; `drafts` and `accepted` are those of lossless decoding.
        """
        prompt, n = sum(map(len, self._plan.prompts)), len(self._plan.choices) // len(self._plan.prompts)
        fed = n * prompt + self._generated - len(self._plan.choices)  # the last token of each is not fed
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
        return {"index": index, "logprobs": None, "finish_reason": delta.finish_reason, "early_exit": exits}

    def _echo(self, index: int) -> str:
        return self._plan.echo[index * len(self._plan.prompts) // len(self._plan.choices)]

    def _chunk(self, choice: Json) -> Json:
        return {**self._envelope(self.chunk_kind), "choices": [choice]}

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

    def _choice(self, index: int, text: str, delta: Delta) -> Json:
        return {**self._frame(index, delta), "message": {"role": "assistant", "content": text}}

    def _part(self, index: int, text: str, delta: Delta) -> Json:
        return {**self._frame(index, delta), "delta": {"content": text}}
