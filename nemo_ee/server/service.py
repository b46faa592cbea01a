# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Answering one request for text, from its body to its response."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from nemo_ee.server.answers.answer import Answer, ChatAnswer
from nemo_ee.server.answers.delta import Delta
from nemo_ee.server.answers.errors import ApiError
from nemo_ee.server.answers.event_stream import EventStream
from nemo_ee.server.answers.json_response import AsciiResponse
from nemo_ee.server.answers.reply import Reply
from nemo_ee.server.engine import Engine
from nemo_ee.server.generation import counted, generation, outcome_of
from nemo_ee.server.metrics import Metrics
from nemo_ee.server.requests.body import read_body
from nemo_ee.server.requests.plan import RequestPlan, make_plan
from nemo_ee.server.requests.protocol import AnyRequest, ChatRequest, parse
from nemo_ee.server.served_model import ServedModel
from nemo_ee.server.settings import ServerConfig


@dataclass(frozen=True)
class Service:
    """All that the endpoints need; the engine has been started."""

    config: ServerConfig
    model: ServedModel
    engine: Engine
    metrics: Metrics

    async def respond(self, request: Request, kind: type[AnyRequest]) -> Response:
        """The response to a request for text.

        Raises:
            ApiError: it is not answered as asked.
            ClientGone: nobody waits for the answer.
            TimeoutError: it could not be sent in time.
        """
        try:
            seconds = min(self.config.receive_timeout_s, self.config.request_timeout_s)
            body = await read_body(request, self.config.max_body_bytes, seconds)
            call, plan = await asyncio.to_thread(self._read, kind, body)
        except Exception as error:
            self.metrics.request(request.url.path, outcome_of(error))
            raise
        form = ChatAnswer if isinstance(call, ChatRequest) else Answer
        spell = self.model.tokenizer.token_bytes
        answer = form(self.model.name, self.model.num_layers, plan, spell, call.include_usage)
        if call.stream:
            return EventStream(self._run(request, plan), answer)
        choices: dict[int, Delta] = {}
        async with self._run(request, plan) as reply:
            while not reply.done:
                for i, delta in (await reply.take()).items():
                    choices.setdefault(i, Delta()).extend(delta)
        return AsciiResponse(answer.whole(choices))

    def card(self) -> dict[str, Any]:
        """The model in `/v1/models`, with its exits and limits."""
        usual = self.model.usual
        return {
            "id": self.model.name,
            "object": "model",
            "created": self.model.created,
            "owned_by": "nemo_ee",
            "early_exit": {
                "base": self.model.base,
                "exits": list(self.model.early_exit.layers),
                "num_layers": self.model.num_layers,
                "default_thresholds": {str(layer): threshold for layer, threshold in usual.exits.items()},
                "default_lossless": usual.lossless,
                "confidence": usual.confidence,
                "kv_policy": usual.kv_policy,
                "pass_prices": self.model.pass_prices,
            },
            "limits": {
                "context_length": self.model.context_length,
                "max_choices": self.config.max_choices,
            },
        }

    def _read(self, kind: type[AnyRequest], body: bytes) -> tuple[AnyRequest, RequestPlan]:
        try:
            call = parse(kind, body)
            return call, make_plan(call, self.model, self.config)
        except RecursionError as error:
            raise ApiError(400, "the body is nested too deeply", code="invalid_json") from error

    @asynccontextmanager
    async def _run(self, request: Request, plan: RequestPlan) -> AsyncIterator[Reply]:
        timeout_s = self.config.request_timeout_s
        async with counted(self.metrics, request.url.path):
            async with generation(plan, self.engine, timeout_s, request.receive) as reply:
                yield reply
