# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What /openapi.json says of the server: all its endpoints, its limits, and who may ask."""

import json

import httpx
import jsonschema_rs
import pytest

from nemo_ee.server.app import create_app
from nemo_ee.server.openapi.document import describe
from nemo_ee.server.requests.api_key import OPEN_PATHS
from nemo_ee.server.settings import KEY_VARIABLE
from tests.support.fake_session import FakeSession
from tests.support.server import LIMITS, fake_service, listening, served_model, server_config
from tests.support.tiny_gpt import VOCABULARY


@pytest.fixture(autouse=True)
def _no_key_in_the_environment(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def description(**settings):
    config = server_config(**settings)
    return describe(served_model(config), config)


def test_it_is_served_and_no_page_is():
    service = fake_service(FakeSession(), context_length=17)
    app = create_app(service)
    served = {(r.path.replace(":path", ""), m) for r in app.routes for m in r.methods}
    with listening(service) as url:
        told = httpx.get(f"{url}/openapi.json").json()
        assert told == json.loads(json.dumps(description(context_length=17)))
        assert [httpx.get(f"{url}/{page}").status_code for page in ("docs", "redoc")] == [404, 404]
    assert served == {(path, method.upper()) for path, item in told["paths"].items() for method in item}


def references(value):
    if isinstance(value, dict):
        yield from ([value["$ref"]] if isinstance(value.get("$ref"), str) else [])
        value = list(value.values())
    for inner in value if isinstance(value, list) else []:
        yield from references(inner)


def test_its_schemas_are_schemas_and_all_that_it_refers_to_is_there():
    told = description()
    schemas = told["components"]["schemas"]
    assert {name.removeprefix("#/components/schemas/") for name in references(told)} <= set(schemas)
    for schema in schemas.values():
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})


def test_limits_are_the_servers():
    fields = description()["components"]["schemas"]["CompletionRequest"]["properties"]
    assert fields["model"]["enum"] == ["tiny"]
    assert fields["n"]["anyOf"][0]["maximum"] == LIMITS["max_choices"]
    ids = fields["prompt"]["anyOf"][2]
    assert (ids["maxItems"], ids["items"]["maximum"]) == (LIMITS["context_length"], VOCABULARY - 1)
    more = description(context_length=7, early_exit=dict(threshold=0.5, confidence="entropy"))["components"][
        "schemas"
    ]
    assert more["CompletionRequest"]["properties"]["prompt"]["anyOf"][2]["maxItems"] == 7
    assert more["EarlyExit"]["properties"]["confidence"]["anyOf"][0] == {"enum": ["entropy"]}
    assert ids["maxItems"] == LIMITS["context_length"], "each server has its own"


def test_keys_are_asked_for_where_there_is_one():
    for settings in ({}, {"api_key": "sk-1"}):
        told = description(**settings)
        assert ("securitySchemes" in told["components"]) == bool(settings)
        for path, item in told["paths"].items():
            for operation in item.values():
                asks = bool(settings) and path not in OPEN_PATHS
                assert ("security" in operation) == ("401" in operation["responses"]) == asks
