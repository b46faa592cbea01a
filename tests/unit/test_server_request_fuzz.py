# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Requests made by hypothesis, right and nearly right: a plan or a refusal in OpenAI's form, in little time and memory."""

import json
import tracemalloc
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings

from nemo_ee.server.errors import LONGEST_MESSAGE, ApiError
from nemo_ee.server.json_response import to_json
from nemo_ee.server.plan import Plan
from nemo_ee.server.protocol import ChatRequest, CompletionRequest
from nemo_ee.server.service import Service
from tests.support.request_fuzz import bodies, right_requests
from tests.support.server import LIMITS, served_model, server_config

KINDS = {"completion": (CompletionRequest, False), "chat": (ChatRequest, True)}
MOST_BYTES = 100_000_000
MOST_MS = 1000


@pytest.fixture(scope="module")
def service():
    config = server_config()
    return SimpleNamespace(model=served_model(config), config=config)


def fuzz(strategy, check, examples):
    """Runs a check of hypothesis's examples: always the same where they are few."""

    @settings(
        max_examples=examples,
        deadline=MOST_MS,
        database=None,
        derandomize=examples < 1000,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(example):
        check(example)

    run()


def answered_or_refused(service, kind, body):
    """The plan, or the refusal."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        _, outcome = Service._read(service, kind, body)
        assert isinstance(outcome, Plan) and 1 <= len(outcome.choices) <= LIMITS["max_choices"]
        assert all(0 < len(prompt) <= LIMITS["max_prompt_tokens"] for prompt in outcome.prompts)
    except ApiError as error:
        outcome = error
        assert error.status in (400, 404) and len(error.message) <= LONGEST_MESSAGE + 1
        told = json.loads(to_json(error.body()))["error"]
        assert told["message"] and told["type"] == "invalid_request_error"
    assert tracemalloc.get_traced_memory()[1] - before < MOST_BYTES
    return outcome


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


EXAMPLES = [pytest.param(200, id="few"), pytest.param(10_000, id="many", marks=pytest.mark.slow)]


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
        assert isinstance(outcome, Plan), f"{request}: {outcome}"

    fuzz(right_requests(chat), accepted, examples)
