# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Requests made by hypothesis, right ones and nearly right ones: a plan or a refusal, in little time and memory."""

import json
import tracemalloc
from types import SimpleNamespace

import jsonschema_rs
import pytest

from nemo_ee.server.answers.errors import LONGEST_MESSAGE, ApiError
from nemo_ee.server.answers.json_response import to_json
from nemo_ee.server.openapi.document import describe
from nemo_ee.server.requests.plan import RequestPlan
from nemo_ee.server.requests.protocol import ChatRequest, CompletionRequest
from nemo_ee.server.service import Service
from tests.support.fuzz import EXAMPLES, MANY, fuzz
from tests.support.request_fuzz import bodies, nearly_right_requests, right_requests
from tests.support.server import LIMITS, served_model, server_config

KINDS = {"completion": (CompletionRequest, False), "chat": (ChatRequest, True)}
MOST_BYTES = 100_000_000


@pytest.fixture(scope="module")
def service():
    config = server_config()
    return SimpleNamespace(model=served_model(config), config=config)


def answered_or_refused(service, kind, body):
    """The plan, or the refusal."""
    if tracemalloc.is_tracing():
        tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        _, outcome = Service._read(service, kind, body)
        assert isinstance(outcome, RequestPlan) and 1 <= len(outcome.choices) <= LIMITS["max_choices"]
        assert all(0 < len(prompt) <= LIMITS["context_length"] for prompt in outcome.prompts)
    except ApiError as error:
        outcome = error
        assert error.status in (400, 404) and len(error.message) <= LONGEST_MESSAGE + 1
        told = json.loads(to_json(error.body()))["error"]
        assert told["message"] and told["type"] == "invalid_request_error"
    assert tracemalloc.get_traced_memory()[1] - before < MOST_BYTES
    return outcome


@pytest.fixture
def traced(examples):
    """Memory is measured where examples are many: that takes four times as long."""
    if examples < MANY:
        yield
        return
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", KINDS)
def test_requests_that_are_nearly_right(name, examples, service, traced):
    kind, chat = KINDS[name]
    fuzz(bodies(chat), lambda body: answered_or_refused(service, kind, body), examples)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", KINDS)
def test_right_requests_are_accepted(name, examples, service, traced):
    kind, chat = KINDS[name]

    def accepted(request):
        outcome = answered_or_refused(service, kind, json.dumps(request).encode())
        assert isinstance(outcome, RequestPlan), f"{request}: {outcome}"

    fuzz(right_requests(chat), accepted, examples)


def validator(service, kind):
    """Of the schema that /openapi.json has for such requests."""
    components = describe(service.model, service.config)["components"]
    reference = {"$ref": f"#/components/schemas/{kind.__name__}", "components": components}
    return jsonschema_rs.Draft202012Validator(reference)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", KINDS)
def test_the_schema_takes_all_that_the_server_takes(name, examples, service):
    """And so the server refuses all that the schema refuses."""
    kind, chat = KINDS[name]
    schema, counts = validator(service, kind), {True: 0, False: 0}

    def agrees(request):
        body = json.dumps(request).encode()
        try:
            Service._read(service, kind, body)
        except ApiError:
            counts[False] += 1
            return
        counts[True] += 1
        assert schema.is_valid(json.loads(body)), request

    fuzz(right_requests(chat) | nearly_right_requests(chat), agrees, examples)
    assert min(counts.values()) > examples / 10, counts


BEYOND_SCHEMAS = (
    "half of a surrogate pair",
    "too large a number",
    "it has no tokens",
    "tokens exceed the server's",
    "characters, and at most",
    "choices (prompts times n)",
    "stream_options: only with stream=true",
    "give one of them",
    "that may come",
    "top_logprobs: only with logprobs=true",
    "thresholds for",
    "exits must ascend",
    "lossless decoding chooses by itself",
    "must be at least 1e-06",
)
"""Refusals of what a schema cannot say of a text or a number, or of fields that go together."""


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", KINDS)
def test_the_server_takes_all_that_the_schema_takes_but_for_what_it_cannot_say(name, examples, service):
    kind, chat = KINDS[name]
    schema = validator(service, kind)

    def agrees(request):
        try:
            valid = schema.is_valid(request)
        except UnicodeEncodeError:
            return
        if valid:
            outcome = answered_or_refused(service, kind, json.dumps(request).encode())
            assert isinstance(outcome, RequestPlan) or any(
                text in outcome.message for text in BEYOND_SCHEMAS
            ), outcome

    fuzz(nearly_right_requests(chat), agrees, examples)
