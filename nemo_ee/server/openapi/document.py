# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The description at /openapi.json: endpoints, what they take and answer, and when they refuse."""

from typing import Any

from pydantic.json_schema import models_json_schema

import nemo_ee
from nemo_ee.server.openapi.answers import ANSWERS
from nemo_ee.server.openapi.requests import REFERENCE, request_schemas
from nemo_ee.server.requests.api_key import OPEN_PATHS
from nemo_ee.server.served_model import ServedModel
from nemo_ee.server.settings import ServerConfig

Schema = dict[str, Any]
VERSION = "3.1.0"
REFUSALS = {
    400: "a field that is unknown, unsupported or impossible, or more than the limits allow",
    401: "no API key, or a wrong one",
    403: "a Host header that is not among allowed_hosts",
    404: "another model's name",
    408: "the request did not arrive in time",
    413: "the body is too long",
    415: "the body is not declared as application/json",
    429: "the queue is full; Retry-After estimates for how many seconds",
    500: "the engine failed, or the model predicts NaN",
    503: "the server ends, or its engine has given up",
    504: "the request's time is up, waiting included",
}
"""Status -> when; all in OpenAI's form."""
HEADERS: dict[int, tuple[str, Schema]] = {
    401: ("WWW-Authenticate", {"const": "Bearer"}),
    429: ("Retry-After", {"type": "integer", "minimum": 1}),
}
"""Status -> a header that it comes with."""


def describe(model: ServedModel, config: ServerConfig) -> Schema:
    """The whole description, of a server with these limits."""
    _, answers = models_json_schema([(kind, "serialization") for kind in ANSWERS], ref_template=REFERENCE)
    components: Schema = {"schemas": {**answers["$defs"], **request_schemas(model, config)}}
    if config.api_key is not None:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": VERSION,
        "info": {
            "title": "nemo_ee",
            "version": nemo_ee.__version__,
            "description": "OpenAI's completions and chats, by a model with early exits.",
        },
        "paths": {path: _secured(path, item, config) for path, item in _paths(model).items()},
        "components": components,
    }


def _paths(model: ServedModel) -> dict[str, dict[str, Schema]]:
    name = {"name": "name", "in": "path", "required": True, "schema": {"enum": [model.name]}}
    card = _operation("The model.", {200: _json("ModelCard"), 404: _error(404)})
    return {
        "/v1/completions": {"post": _generates("Continues texts.", "Completion")},
        "/v1/chat/completions": {"post": _generates("Answers a conversation.", "Chat")},
        "/v1/models": {"get": _operation("The models: one.", {200: _json("ModelList")})},
        "/v1/models/{name}": {"get": {**card, "parameters": [name]}},
        "/health": {
            "get": _operation("Whether requests are accepted.", {200: _json("Health"), 503: _json("Health")})
        },
        "/metrics": {"get": _operation("For Prometheus.", {200: _text("text/plain")})},
        "/": {"get": _operation("A page that shows the exits.", {200: _text("text/html")})},
        "/openapi.json": {
            "get": _operation("This.", {200: _content("application/json", {"type": "object"})})
        },
    }


def _generates(summary: str, name: str) -> Schema:
    """An operation that takes a request for text; `name` begins the names of its schemas."""
    whole = name if name == "Completion" else f"{name}Completion"
    chunks = {
        "description": f"events: `data: ` and a {whole}Chunk each, then `data: [DONE]`, or else an Error"
    }
    answer = _json(whole)
    answer["content"]["text/event-stream"] = {"schema": chunks}
    refused = {status: _error(status) for status in REFUSALS if status not in (401, 403)}
    body = {"required": True, "content": _json(f"{name}Request")["content"]}
    return {**_operation(summary, {200: answer, **refused}), "requestBody": body}


def _secured(path: str, item: dict[str, Schema], config: ServerConfig) -> dict[str, Schema]:
    """An endpoint with what is asked of all requests."""
    asks = config.api_key is not None and path not in OPEN_PATHS
    for operation in item.values():
        operation["responses"] |= {
            str(status): _error(status) for status in (401, 403) if status != 401 or asks
        }
        if asks:
            operation["security"] = [{"key": []}]
    return item


def _operation(summary: str, responses: dict[int, Schema]) -> Schema:
    return {"summary": summary, "responses": {str(status): answer for status, answer in responses.items()}}


def _error(status: int) -> Schema:
    answer = {**_json("Error"), "description": REFUSALS[status]}
    if status in HEADERS:
        name, schema = HEADERS[status]
        answer["headers"] = {name: {"required": True, "schema": schema}}
    return answer


def _json(name: str) -> Schema:
    return _content("application/json", {"$ref": REFERENCE.format(model=name)})


def _text(kind: str) -> Schema:
    return _content(kind, {"type": "string"})


def _content(kind: str, schema: Schema) -> Schema:
    return {"description": "the answer", "content": {kind: {"schema": schema}}}
