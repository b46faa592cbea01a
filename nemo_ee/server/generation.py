# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A request from its acceptance to its last token, as its coroutine sees it."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from nemo_ee.server.answers.errors import ApiError, ClientGone
from nemo_ee.server.answers.reply import Reply
from nemo_ee.server.engine import Engine
from nemo_ee.server.job import Job
from nemo_ee.server.metrics import Metrics
from nemo_ee.server.requests.plan import RequestPlan

SENDING_SECONDS = 10.0
"""How much longer than its request's time an answer may take to be sent."""
OUTCOMES = {429: "rejected", 500: "error", 503: "rejected", 504: "timeout"}
"""Status of an error -> how its request ended; "invalid" for all others."""


@asynccontextmanager
async def generation(
    plan: RequestPlan, engine: Engine, timeout_s: float, receive: Callable[[], Awaitable[Any]]
) -> AsyncIterator[Reply]:
    """Queues a plan's choices, and on leaving takes back those that did not end.

    The connection is watched meanwhile: when the client closes it, `Reply.take` raises `ClientGone`.

    Args:
        plan: what to generate.
        engine: where.
        timeout_s: seconds for the request, waiting included.
        receive: of the connection (ASGI); the request's body has been read.

    Raises:
        ApiError: see `Engine.submit`; 503 if the server ends and does not wait for it.
        TimeoutError: the answer could not be sent in time.
    """
    reply = Reply(len(plan.choices))
    deadline = time.monotonic() + timeout_s
    jobs = [Job(choice, reply, i, deadline) for i, choice in enumerate(plan.choices)]
    engine.submit(jobs)
    watch = asyncio.create_task(_fail_when_closed(reply, receive))
    try:
        async with asyncio.timeout(timeout_s + SENDING_SECONDS):
            yield reply
    except asyncio.CancelledError as error:
        raise ApiError(503, "the server is stopping; the request was cut", code="stopping") from error
    finally:
        watch.cancel()
        for job in jobs:
            job.cancelled = True


@asynccontextmanager
async def counted(metrics: Metrics, endpoint: str) -> AsyncIterator[None]:
    """Tells the metrics how a request ended."""
    outcome = "ok"
    try:
        yield
    except BaseException as error:
        outcome = outcome_of(error)
        raise
    finally:
        metrics.request(endpoint, outcome)


def outcome_of(error: BaseException) -> str:
    """How a request ended, for the metrics."""
    if isinstance(error, ApiError):
        return OUTCOMES.get(error.status, "invalid")
    if isinstance(error, ClientGone | asyncio.CancelledError):
        return "cancelled"
    return "timeout" if isinstance(error, TimeoutError) else "error"


async def _fail_when_closed(reply: Reply, receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    reply.fail(ClientGone())
