# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The endpoints over a real connection and a fake session: answers, streams, errors, closed connections."""

import json
import socket

import httpx
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.support.fake_session import FakeSession, confidence_of, layer_of, token_of
from tests.support.server import fake_service, listening, tiny_tokenizer, until

PROMPT = "w1 w2"


class Client:
    """A server, its fake session, and a client."""

    def __init__(self, service, session, url):
        self.service, self.session, self.url = service, session, url
        self.http = httpx.Client(base_url=url, timeout=30)

    def post(self, path="/v1/completions", **fields):
        body = {
            "model": "tiny",
            "temperature": 0,
            **({} if "messages" in fields else {"prompt": PROMPT}),
            **fields,
        }
        return self.http.post(path, json=body)

    def chat(self, content="w5 w6", **fields):
        return self.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], **fields)

    def chunks(self, answer):
        """The events of a stream but its end."""
        events = answer.text.split("\n\n")
        assert answer.status_code == 200, answer.text
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    def outcomes(self):
        samples = self.service.metrics.registry.collect()
        return {
            (s.labels["endpoint"], s.labels["outcome"]): s.value
            for family in samples
            for s in family.samples
            if s.name == "nemo_ee_requests_total"
        }

    def idle(self):
        engine = self.service.engine
        until(lambda: engine.running == engine.waiting == 0 and not self.session.running)


@pytest.fixture
def client(request):
    settings = dict(getattr(request, "param", {}))
    session = FakeSession(slots=settings.pop("slots", 4), step_seconds=settings.pop("step_seconds", 0.0))
    service = fake_service(session, **settings)
    with listening(service) as url:
        client = Client(service, session, url)
        with client.http:
            yield client


def slow(**settings):
    """Parameters of the fixture: a session that takes its time."""
    return pytest.mark.parametrize("client", [{"step_seconds": 0.02, **settings}], indirect=True)


def words(text, count):
    tokenizer = tiny_tokenizer()
    prompt = tokenizer.text_to_ids(text)
    return tokenizer.ids_to_tokens([token_of(prompt, i) for i in range(count)])


def expected_exits(text, count):
    prompt = tiny_tokenizer().text_to_ids(text)
    return {
        "tokens": [f" {word}" for word in words(text, count)],
        "exit_layers": [layer_of(prompt, i) for i in range(count)],
        "confidences": [confidence_of(prompt, i) for i in range(count)],
    }


def test_a_completion_with_its_exits(client):
    answer = client.post(max_tokens=6).json()
    choice = answer["choices"][0]
    assert choice["text"] == "".join(f" {word}" for word in words(PROMPT, 6))
    assert choice["early_exit"] == expected_exits(PROMPT, 6)
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    assert (answer["object"], answer["model"], answer["id"][:5]) == ("text_completion", "tiny", "cmpl-")
    layers = 2 * 8 + sum(choice["early_exit"]["exit_layers"][1:])
    cost = {"layers_run": layers, "full_depth_layers": 7 * 8, "drafts": 0, "accepted": 0}
    usage = {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8, "early_exit": cost}
    assert answer["usage"] == usage


def test_several_prompts_and_choices_are_in_order(client):
    answer = client.post(prompt=["w1 w2", "w9"], n=2, max_tokens=3, echo=True).json()
    texts = [f"{text} {' '.join(words(text, 3))}" for text in ("w1 w2", "w1 w2", "w9", "w9")]
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (3, 12)
    assert answer["usage"]["early_exit"]["full_depth_layers"] == 8 * (2 * 3 + 12 - 4)


def test_a_stream_gives_the_same_in_pieces(client):
    whole = client.post(prompt=["w1 w2", "w9"], max_tokens=8).json()
    stream = client.post(
        prompt=["w1 w2", "w9"], max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    assert stream.headers["content-type"].startswith("text/event-stream")
    *chunks, last = client.chunks(stream)
    assert last["choices"] == [] and last["usage"] == whole["usage"] and chunks[0]["usage"] is None
    assert len({chunk["id"] for chunk in chunks}) == 1
    for index, choice in enumerate(whole["choices"]):
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == index]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
        for key, values in choice["early_exit"].items():
            assert sum((part["early_exit"][key] for part in parts), []) == values
        assert all(part["text"] == "".join(part["early_exit"]["tokens"]) for part in parts)


def test_answers_are_of_openais_types(client):
    """Their client builds its objects unchecked; these are checked, field by field."""
    fields = dict(max_tokens=4, n=2, stop=words(PROMPT, 3)[2])
    streamed = dict(**fields, stream=True, stream_options={"include_usage": True})
    Completion.model_validate(client.post(**fields).json(), strict=True)
    ChatCompletion.model_validate(client.chat(**fields).json(), strict=True)
    for chunk in client.chunks(client.chat(**streamed)):
        ChatCompletionChunk.model_validate(chunk, strict=True)
    for chunk in client.chunks(client.post(**streamed)):
        for choice in chunk["choices"]:  # null in their own streams, which this type forgets
            choice["finish_reason"] = choice["finish_reason"] or "length"
        Completion.model_validate(chunk, strict=True)
    (card,) = client.http.get("/v1/models").json()["data"]
    assert Model.model_validate(card, strict=True).id == "tiny"


@slow(step_seconds=0.1)
def test_a_stream_comes_as_it_is_generated(client):
    fields = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "stream": True}
    with client.http.stream("POST", "/v1/completions", json=fields) as answer:
        lines = answer.iter_lines()
        assert next(lines) and client.service.engine.running == 1, "the first is here, the last is to come"
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_chats(client):
    prompt = "user w5 w6 <eos> assistant"
    answer = client.chat(max_completion_tokens=4).json()
    message = answer["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "".join(f" {word}" for word in words(prompt, 4))}
    assert answer["object"] == "chat.completion"
    first, *chunks = client.chunks(client.chat(max_tokens=4, stream=True))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == message["content"]


def test_echo_begins_a_stream(client):
    chunks = client.chunks(client.post(max_tokens=2, stream=True, echo=True))
    assert chunks[0]["choices"][0]["text"] == PROMPT and chunks[0]["choices"][0]["early_exit"]["tokens"] == []


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_are_cut(client, stream):
    third = words(PROMPT, 3)[2]
    answer = client.post(max_tokens=9, stop=third, stream=stream)
    text = "".join(f" {word}" for word in words(PROMPT, 2)) + " "
    parts = [chunk["choices"][0] for chunk in client.chunks(answer)] if stream else answer.json()["choices"]
    assert "".join(part["text"] for part in parts) == text and parts[-1]["finish_reason"] == "stop"
    assert sum(len(part["early_exit"]["exit_layers"]) for part in parts) == 3
    client.idle()


def test_the_model_is_listed_with_its_exits(client):
    listed = client.http.get("/v1/models").json()
    assert listed["data"] == [client.http.get("/v1/models/tiny").json()]
    card = listed["data"][0]
    assert card["id"] == "tiny" and card["limits"] == {
        "context_length": 40,
        "max_choices": 4,
    }
    assert card["early_exit"] == {
        "base": "tiny",
        "exits": [2, 4],
        "num_layers": 8,
        "default_thresholds": {"2": 0.9, "4": 0.8},
        "default_lossless": False,
        "confidence": "max_probability",
        "kv_policy": "catch_up",
        "pass_prices": {},
    }


def error_of(answer, status):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_errors_have_openais_form(client):
    assert error_of(client.post(max_tokens=-1), 400)["param"] == "max_tokens"
    assert error_of(client.post(model="gpt-4"), 404)["code"] == "model_not_found"
    assert error_of(client.http.get("/v1/models/gpt-4"), 404)["code"] == "model_not_found"
    assert (
        "GET /v1/completions: Method Not Allowed"
        in error_of(client.http.get("/v1/completions"), 405)["message"]
    )
    assert "/v2: Not Found" in error_of(client.http.post("/v2"), 404)["message"]
    form = client.http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert "application/json" in error_of(form, 415)["message"]
    headers = {"content-type": "application/json; charset=utf-8"}
    assert (
        "no JSON"
        in error_of(client.http.post("/v1/completions", content=b"{", headers=headers), 400)["message"]
    )
    assert error_of(client.post(prompt="w1 " * 1_000_000), 413)["code"] == "too_large"
    assert error_of(client.post(early_exit=dict(exits=[3]), stream=True), 400)["param"] == "early_exit.exits"
    outcomes = client.outcomes()
    assert outcomes == {("/v1/completions", "invalid"): 6}
    assert client.session.added == []


def raw(client, body):
    return client.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})


@pytest.mark.parametrize(
    "field",
    ['"\\ud800": 1', '"early_exit": {"\\ud800": 1}', '"early_exit": {"confidence": "\\udc00"}'],
)
def test_halves_of_characters_are_refused_not_choked_on(client, field):
    assert error_of(raw(client, f'{{"model": "tiny", "prompt": "w1", {field}}}'), 400)["message"]


def test_nested_bodies_are_refused_however_deep(client):
    """At some depth a body can be read, but not be shown in a message."""
    for depth in (*range(900, 1000, 2), 100_000):
        body = (
            f'{{"model": "tiny", "prompt": "w1", "early_exit": {{"threshold": {"[" * depth}{"]" * depth}}}}}'
        )
        assert error_of(raw(client, body), 400)["message"]


def test_no_event_is_taken_for_two_lines(client):
    """Clients that split lines as Unicode has them would cut an event at U+2028."""
    fields = {"model": "tiny", "prompt": "w1\u2028\x85w2", "max_tokens": 1, "stream": True, "echo": True}
    with client.http.stream("POST", "/v1/completions", json=fields) as answer:
        first = next(answer.iter_lines())
    assert json.loads(first.removeprefix("data: "))["choices"][0]["text"] == "w1\u2028\x85w2"


def test_names_of_other_sites_are_refused(client):
    for host, status in (
        ("localhost:5", 200),
        ("[::1]", 200),
        ("evil.example", 403),
        ("evil.example:80", 403),
    ):
        assert client.http.get("/health", headers={"host": host}).status_code == status


@slow(slots=1, queue_size=4, context_length=1002)
def test_more_than_the_queue_holds_is_refused(client):
    fields = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1000}
    running = send_only(client.url, json.dumps(fields).encode())
    until(lambda: client.service.engine.running == 1)
    waiting = send_only(client.url, json.dumps({**fields, "n": 4}).encode())
    until(lambda: client.service.engine.waiting == 4)
    refused = client.post(stream=True)
    error = error_of(refused, 429)
    assert error["code"] == "queue_full" and error["type"] == "rate_limit_error"
    assert int(refused.headers["retry-after"]) >= 1
    running.close()
    waiting.close()
    client.idle()
    assert client.outcomes()["/v1/completions", "rejected"] == 1


def send_only(url, body):
    """Posts a completion and leaves the answer unread; returns the connection."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@slow(slots=1)
def test_closed_connections_cancel(client, stream):
    fields = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "n": 2, "stream": stream}
    connection = send_only(client.url, json.dumps(fields).encode())
    until(lambda: client.session.steps > 2 and client.service.engine.waiting == 1)
    connection.close()
    client.idle()
    assert client.session.steps < 20 and len(client.session.removed) == 1
    until(lambda: client.outcomes() == {("/v1/completions", "cancelled"): 1})


@slow(slots=1, request_timeout_s=0.2, context_length=42)
def test_time_is_up(client):
    error = error_of(client.post(max_tokens=40), 504)
    assert error["code"] == "timeout" and "while generating" in error["message"]
    stream = client.post(max_tokens=40, stream=True)
    *events, last, end = stream.text.split("\n\n")
    assert (
        stream.status_code == 200 and end == "" and "time was up" in json.loads(last[6:])["error"]["message"]
    )
    assert len(events) > 2
    client.idle()
    assert client.outcomes() == {("/v1/completions", "timeout"): 2}


@slow()
def test_a_failure_of_the_engine_is_500(client):
    client.session.fail = RuntimeError("broken")
    assert error_of(client.post(), 500)["code"] == "engine_failure"
    assert client.post(max_tokens=2).status_code == 200 and client.http.get("/health").status_code == 200
    for _ in range(3):
        client.session.fail = RuntimeError("broken")
        client.post(max_tokens=2)
    until(lambda: client.service.engine.state == "failed")
    health = client.http.get("/health")
    assert health.status_code == 503 and health.json()["status"] == "failed"
    assert error_of(client.post(), 503)["code"] == "failed"
    assert client.outcomes() == {
        ("/v1/completions", "error"): 4,
        ("/v1/completions", "ok"): 1,
        ("/v1/completions", "rejected"): 1,
    }


def test_a_body_that_does_not_arrive(request):
    session = FakeSession()
    with listening(fake_service(session, request_timeout_s=0.2)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_reader_that_is_slow_gets_all_tokens(client):
    """The answer is generated long before it is read, and the engine does not wait."""
    fields = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "n": 4, "temperature": 0, "stream": True}
    with client.http.stream("POST", "/v1/completions", json=fields) as answer:
        client.idle()
        lines = [line for line in answer.iter_lines() if line]
    parts = [json.loads(line[6:])["choices"] for line in lines[:-1]]
    for index in range(4):
        mine = [part for choices in parts for part in choices if part["index"] == index]
        assert (
            sum((part["early_exit"]["exit_layers"] for part in mine), [])
            == expected_exits(PROMPT, 24)["exit_layers"]
        )


@slow(slots=1, shutdown_grace_s=0.3, context_length=42)
def test_shutting_down_cuts_after_the_grace_period(client, request):
    connection = send_only(
        client.url, json.dumps({"model": "tiny", "prompt": PROMPT, "max_tokens": 40}).encode()
    )
    until(lambda: client.service.engine.running == 1)
    client.service.engine.drain(0.3)
    health = client.http.get("/health")
    assert health.status_code == 503 and health.json() == {"status": "draining", "running": 1, "waiting": 0}
    assert error_of(client.post(), 503)["code"] == "draining"
    with connection:
        assert connection.recv(10_000).startswith(b"HTTP/1.1 503")


def test_the_end_of_the_server_cuts_after_the_grace_period():
    session = FakeSession(slots=1, step_seconds=0.02)
    service = fake_service(session, shutdown_grace_s=0.2, context_length=10_002)
    with listening(service) as url:
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 10_000}
        connection = send_only(url, json.dumps(body).encode())
        until(lambda: service.engine.running == 1)
    with connection:
        assert connection.recv(10_000).startswith(b"HTTP/1.1 503")


def test_metrics_are_prometheus_text(client):
    client.post(max_tokens=5)
    client.post(max_tokens=-1)
    text = client.http.get("/metrics").text
    for line in (
        'nemo_ee_requests_total{endpoint="/v1/completions",outcome="ok"} 1.0',
        'nemo_ee_requests_total{endpoint="/v1/completions",outcome="invalid"} 1.0',
        "nemo_ee_queue_depth 0.0",
        "nemo_ee_running_sequences 0.0",
        'nemo_ee_generated_tokens_total{exit_layer="8"}',
        "nemo_ee_time_to_first_token_seconds_count 1.0",
        "nemo_ee_inter_token_seconds_count 4.0",
        "nemo_ee_tokens_per_second 0.5",
    ):
        assert line in text, line


def test_the_page_needs_nothing_from_elsewhere(client):
    page = client.http.get("/")
    assert page.status_code == 200 and "<title>Early exits</title>" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text and "https://" not in page.text
