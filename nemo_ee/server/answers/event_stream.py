# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""An answer as server-sent events, while it is generated."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nemo_ee.server.answers.answer import Answer
from nemo_ee.server.answers.errors import ApiError, ClientGone
from nemo_ee.server.answers.json_response import to_json
from nemo_ee.server.answers.reply import Reply
from nemo_ee.server.generation import SENDING_SECONDS

DONE = b"data: [DONE]\n\n"
PING, PING_SECONDS = b": ping\n\n", 15.0
"""A comment, sent after so long a silence: proxies cut connections on which nothing comes."""
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class EventStream(Response):
    """Sends chunks as tokens come.

    Nothing is sent before the first token or `PING`, so an error until then (a full queue, a timeout) has its own
    HTTP status. Whatever comes later is the last event: a stream that has begun ends with `DONE` or an error.

    Args:
        generation: gives the reply; see `nemo_ee.server.generation.generation`.
        answer: its form.
    """

    def __init__(self, generation: AbstractAsyncContextManager[Reply], answer: Answer):
        super().__init__()
        self._generation, self._answer = generation, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the request; see the class.

        Raises:
            Exception: before anything was sent.
        """
        started, end = False, DONE
        try:
            async with self._generation as reply:
                async for event in self._events(reply):
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                        started = True
                    if event:
                        await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:
            if not started:
                raise
            if isinstance(error, ClientGone):
                return
            end = _event(ApiError.from_failure(error).body())
        with suppress(TimeoutError):
            async with asyncio.timeout(SENDING_SECONDS):
                await send({"type": "http.response.body", "body": end})

    async def _events(self, reply: Reply) -> AsyncIterator[bytes]:
        """The events of the body; the first says that it has begun, and may be empty."""
        opening = list(self._answer.opening())
        while not reply.done:
            try:
                async with asyncio.timeout(PING_SECONDS):
                    new = await reply.take()
            except TimeoutError:
                yield PING
                continue
            if opening is not None:
                yield b"".join(map(_event, opening))
                opening = None
            yield b"".join(_event(self._answer.chunk(i, delta)) for i, delta in sorted(new.items()))
        if self._answer.include_usage:
            yield _event(self._answer.usage_chunk())


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"
