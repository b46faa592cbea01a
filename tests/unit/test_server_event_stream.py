# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The end of a stream that nobody takes."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest
from openai._streaming import SSEDecoder

from nemo_ee.decoding.generated_sequence import SequenceStatistics
from nemo_ee.server.answers.answer import Answer, ChatAnswer
from nemo_ee.server.answers.delta import Delta
from nemo_ee.server.answers.errors import ApiError
from nemo_ee.server.answers.event_stream import PING, EventStream
from nemo_ee.server.answers.reply import Reply
from nemo_ee.server.requests.plan import RequestPlan


def test_a_stream_whose_time_is_up_while_the_engine_is_busy_ends_with_an_error():
    @asynccontextmanager
    async def generation():
        reply = Reply(1)
        reply.put(0, Delta(["w"], [8], [0.5], None, SequenceStatistics()))
        async with asyncio.timeout(0.05):
            yield reply

    sent = []

    async def send(message):
        sent.append(message)

    stream = EventStream(generation(), Answer("tiny", 8, RequestPlan([[7]], [""], [], [None]), bytes))
    asyncio.run(asyncio.wait_for(stream({}, None, send), 10))
    assert b'"code":"timeout"' in sent[-1]["body"].replace(b" ", b"") and not sent[-1].get("more_body")


def test_pings_come_while_nothing_else_does(monkeypatch):
    monkeypatch.setattr("nemo_ee.server.answers.event_stream.PING_SECONDS", 0.05)

    @asynccontextmanager
    async def generation():
        reply, later = Reply(1), asyncio.get_running_loop().call_later
        later(0.12, reply.put, 0, Delta(["w"], [8], [0.5]))
        later(0.24, reply.put, 0, Delta(["x"], [8], [0.5], "length", SequenceStatistics()))
        yield reply

    sent = []

    async def send(message):
        sent.append(message)

    plan = RequestPlan([[7]], [""], [], [None])
    stream = EventStream(generation(), ChatAnswer("tiny", 8, plan, bytes))
    asyncio.run(asyncio.wait_for(stream({}, None, send), 10))
    bodies = [message["body"] for message in sent[1:]]
    kinds = ["ping" if body == PING else "event" if body.startswith(b"data: ") else "?" for body in bodies]
    assert kinds == ["ping", "ping", "event", "event", "ping", "ping", "event", "event"]
    assert b'"role":"assistant"' in bodies[2], "who speaks comes with a token"
    decoder = SSEDecoder()
    read = [json.loads(event.data) for event in decoder.iter_bytes(iter(bodies)) if event.data != "[DONE]"]
    assert [chunk["choices"][0]["delta"]["content"] for chunk in read] == ["", "w", "x"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_reader_that_takes_no_end_is_given_up(monkeypatch, fails):
    """Its request would otherwise go on for as long as the client likes."""
    monkeypatch.setattr("nemo_ee.server.answers.event_stream.SENDING_SECONDS", 0.05)

    @asynccontextmanager
    async def generation():
        reply = Reply(1)
        reply.put(0, Delta(["w"], [8], [0.5], None if fails else "length", SequenceStatistics()))
        if fails:
            asyncio.get_running_loop().call_soon(reply.fail, ApiError(504, "late"))
        yield reply

    sent = []

    async def send(message):
        if len(sent) == 2:
            await asyncio.Event().wait()
        sent.append(message["type"])

    plan = RequestPlan([[7]], [""], [], [None])
    stream = EventStream(generation(), Answer("tiny", 8, plan, bytes))
    asyncio.run(asyncio.wait_for(stream({}, None, send), 10))
    assert sent == ["http.response.start", "http.response.body"]
