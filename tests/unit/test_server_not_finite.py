# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A model that predicts NaN: its requests end with an error, others go on; /health tells where all are like that."""

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from nemo_ee.errors import GenerationError
from nemo_ee.server.engine import MAX_FAILURES
from nemo_ee.server.probe import LIMIT
from nemo_ee.server.probe import PROMPT as PROBE
from tests.support.fake_session import FakeSession
from tests.support.server import fake_service, listening, serving, tiny_tokenizer, until

GOOD, BAD = "w1 w2", "w3"


def is_bad(prompt, place, first=4):
    """Predictions for `BAD` are NaN from some place on."""
    return prompt == tiny_tokenizer().text_to_ids(BAD) and place >= first


@contextmanager
def client(session, **settings):
    service = fake_service(session, **settings)
    with listening(service) as url, httpx.Client(base_url=url, timeout=20) as http:
        http.service = service
        yield http


def post(http, prompt=BAD, **fields):
    return http.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "max_tokens": 12, **fields})


def events(answer):
    """What a stream sent; it ends with a whole event."""
    assert answer.status_code == 200 and answer.text.endswith("\n\n")
    return [event.removeprefix("data: ") for event in answer.text.split("\n\n")[:-1]]


def tokens_in(chunks):
    return sum(len(part["early_exit"]["tokens"]) for chunk in chunks for part in chunk["choices"])


def failures(http):
    text = http.get("/metrics").text
    return [
        float(next(line for line in text.splitlines() if line.startswith(name)).split()[-1])
        for name in ("nemo_ee_not_finite_sequences_total", "nemo_ee_engine_failures_total")
    ]


def test_a_stream_ends_with_an_error_and_the_others_of_its_batch_with_all_their_tokens():
    session = FakeSession(step_seconds=0.01)
    session.is_nan = is_bad
    with client(session) as http:
        expected = post(http, GOOD, n=2, seed=1).json()["choices"]
        answer = post(http, stream=True)
        *chunks, end = map(json.loads, events(answer))
        assert tokens_in(chunks) == 4 and end["error"]["code"] == "not_finite"
        assert end["error"]["type"] == "server_error"
        with ThreadPoolExecutor(3) as pool:
            together = [
                pool.submit(post, http, prompt, **more) for prompt, more in ((GOOD, dict(n=2)), (BAD, {}))
            ]
            good, bad = [each.result() for each in together]
        assert [c["text"] for c in good.json()["choices"]] == [c["text"] for c in expected]
        assert bad.status_code == 500 and bad.json()["error"]["code"] == "not_finite"
        assert http.get("/health").status_code == 200, "the model answers others"
        assert failures(http) == [2, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_request_of_several_choices_ends_with_its_first_failure(value, monkeypatch):
    monkeypatch.setattr(
        "tests.support.fake_session.confidence_of", lambda prompt, place: value if prompt != PROBE else 0.5
    )
    with client(FakeSession()) as http:
        answer = post(http, prompt=[GOOD, BAD])
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "not_finite"


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_has_only_nan_fails_its_health(stream):
    session = FakeSession()
    with client(session) as http:
        assert http.get("/health").json()["status"] == "ok"
        session.is_nan = lambda prompt, place: place >= 1
        answer = post(http, GOOD, stream=stream)
        error = json.loads(events(answer)[-1])["error"] if stream else answer.json()["error"]
        assert error["code"] == "not_finite"
        until(lambda: http.get("/health").status_code == 503)
        assert http.get("/health").json() == {"status": "not_finite", "running": 0, "waiting": 0}
        refused = post(http, GOOD)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "not_finite"
        assert "predictions are NaN or infinite" in refused.json()["error"]["message"]
        assert failures(http) == [1, MAX_FAILURES]


def test_new_caches_may_help():
    class Recovering(FakeSession):
        @contextmanager
        def opened(self):
            self.is_nan = lambda prompt, place: False
            with super().opened() as session:
                yield session

    session = Recovering()
    with client(session) as http:
        session.is_nan = lambda prompt, place: True
        assert post(http).status_code == 500
        until(lambda: failures(http) == [1, 1])
        assert post(http).status_code == 200 and http.get("/health").status_code == 200


@pytest.mark.parametrize("first", range(LIMIT))
def test_a_model_that_has_only_nan_is_not_served(first):
    session = FakeSession()
    session.is_nan = lambda prompt, place: place == first
    with pytest.raises(GenerationError, match="predictions are NaN or infinite; its weights are damaged"):
        fake_service(session)


def test_the_probe_disturbs_nobody():
    """It decodes beside others, whose tokens are not lost even where they end with it."""
    session = FakeSession(slots=3)
    session.is_nan = lambda prompt, place: is_bad(prompt, place, first=0)
    with client(session, max_choices=3) as http:
        alone = [post(http, GOOD, max_tokens=n).json()["choices"][0]["text"] for n in (1, 2, 3, 4)]
        for n in (1, 2, 3, 4):
            answer = http.post(
                "/v1/completions",
                json={"model": "tiny", "prompt": [GOOD, GOOD, BAD], "max_tokens": n, "stream": True},
            )
            texts = ["", ""]
            for event in map(json.loads, events(answer)[:-1] if answer.status_code == 200 else []):
                texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
            assert all(alone[n - 1].startswith(text) for text in texts)
        assert post(http, GOOD, max_tokens=4).json()["choices"][0]["text"] == alone[3]
        assert session.running == []


class Failing(FakeSession):
    """Fails in the middle of a text."""

    def step(self):
        if any(len(s.tokens) == 4 for s in self.running):
            raise self.error
        return super().step()


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), MemoryError(), ValueError("nan")], ids=repr)
def test_streams_end_with_an_event_when_the_engine_fails(error):
    session = Failing()
    session.error = error
    with client(session) as http:
        for _ in range(MAX_FAILURES):
            *chunks, end = map(json.loads, events(post(http, GOOD, stream=True)))
            assert tokens_in(chunks) == 4 and end["error"]["code"] == "engine_failure"


def test_streams_end_with_an_event_when_an_answer_cannot_be_written(monkeypatch):
    def unwritable(self, index, delta):
        raise ValueError("Out of range float values are not JSON compliant")

    with client(FakeSession()) as http:
        monkeypatch.setattr("nemo_ee.server.answers.answer.Answer.chunk", unwritable)
        assert json.loads(events(post(http, GOOD, stream=True))[-1])["error"]["code"] == "internal_error"


def test_streams_end_with_an_event_when_the_engine_does_not_come_to_an_end(monkeypatch):
    """A step that takes longer than the server waits for requests when it ends."""
    monkeypatch.setattr("nemo_ee.server.serve.SENDING_SECONDS", 0)
    session = FakeSession(step_seconds=0.01)
    service = fake_service(session, shutdown_grace_s=0, context_length=10_010)
    body = {"model": "tiny", "prompt": GOOD, "max_tokens": 10_000, "stream": True}

    def read(url):
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as answer:
            return [line for line in answer.iter_lines() if line], time.monotonic()

    with ThreadPoolExecutor(1) as pool:
        with serving(service) as server:
            reading = pool.submit(read, server.url)
            until(lambda: session.steps > 5)
            session.step_seconds, began = 1.5, time.monotonic()
            server.should_exit = True
            lines, ended = reading.result(20)
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "stopping"
    assert ended - began < 1.0, "before the step was done"
