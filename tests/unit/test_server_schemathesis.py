# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""schemathesis against a server that listens: requests made of what /openapi.json says, right and wrong ones."""

import json
import re

import pytest
import requests
import schemathesis
from hypothesis import settings
from schemathesis.checks import CHECKS, load_all_checks

from nemo_ee.server.openapi.answers import ChatCompletionChunk, CompletionChunk, Error
from nemo_ee.server.openapi.document import describe
from tests.support.fake_session import FakeSession
from tests.support.server import fake_service, listening, served_model, server_config

CONFIG = server_config(api_key="sk-fuzz")
HEADERS = {"Authorization": "Bearer sk-fuzz"}
CHUNKS = {"/v1/completions": CompletionChunk, "/v1/chat/completions": ChatCompletionChunk}
SECONDS = 2.0
"""That an answer may take."""
FEW = settings(max_examples=20, deadline=None, database=None, derandomize=True)
MANY = settings(max_examples=2500, deadline=None, database=None)
"""Beside some thousand cases that schemathesis makes of every schema."""

load_all_checks()
EXCLUDED = CHECKS.get_by_names(["positive_data_acceptance"])
"""Our own tests hold that: the server refuses some requests for what a schema cannot say."""
schema = schemathesis.openapi.from_dict(describe(served_model(CONFIG), CONFIG))
schema.config.max_stream_events = 1000  # all: by default some are read


@pytest.fixture(scope="module")
def server():
    """Its address and a client's connection; it must be well afterwards."""
    service = fake_service(FakeSession(), api_key=CONFIG.api_key)
    with listening(service) as url, requests.Session() as session:
        assert requests.get(f"{url}/openapi.json").json() == json.loads(json.dumps(schema.raw_schema))
        yield url, session
        assert service.engine.state == "ok" and service.engine.running == service.engine.waiting == 0
        assert b"nemo_ee_engine_failures_total 0.0" in service.metrics.text()


def check(case, server):
    """One request: schemathesis's checks, and that a stream has whole events alone and an end."""
    url, session = server
    answer = case.call(base_url=url, session=session, headers=HEADERS)
    case.validate_response(answer, excluded_checks=EXCLUDED, headers=HEADERS)
    assert answer.elapsed < SECONDS
    if answer.headers["content-type"][0].startswith("text/event-stream"):
        *events, end, nothing = answer.text.split("\n\n")
        assert end == "data: [DONE]" and nothing == ""
        for event in events:
            CHUNKS[case.path].model_validate_json(event.removeprefix("data: "))
    elif answer.status_code >= 400:
        Error.model_validate_json(answer.text)


def requests_of(operation, how):
    """A test whose requests are of one operation."""

    @operation.parametrize()
    @how
    def test(case, server):
        check(case, server)

    return test


# Each operation's tests have a name of their own: pytest-xdist runs one test of a node id, and schemathesis gives
# all the same.
for path, methods in schema.raw_schema["paths"].items():
    for method in methods:
        operation, name = (
            schema.include(path=path, method=method.upper()),
            re.sub(r"\W+", "_", f"{method}{path}"),
        )
        globals()[f"test_requests_of_{name}"] = requests_of(operation, FEW)
        globals()[f"test_many_requests_of_{name}"] = pytest.mark.slow(requests_of(operation, MANY))


def test_every_operation_has_its_tests():
    operations = {
        f"{method}{path}" for path, methods in schema.raw_schema["paths"].items() for method in methods
    }
    assert len(operations) == len({name for name in globals() if name.startswith("test_requests_of_")}) == 8
