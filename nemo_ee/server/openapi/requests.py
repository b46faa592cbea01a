# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""JSON schemas of the requests that a server accepts: of the models that check them, with its model's limits.

A schema refuses nothing that the server takes. What it cannot say, e.g. how many tokens a text has, or that a number
has too many digits, the server refuses with 400.
"""

import copy
import dataclasses
from typing import Any

from nemo_ee.decoding.request import ExitOptions
from nemo_ee.server.requests.plan import CHARACTERS_PER_TOKEN
from nemo_ee.server.requests.protocol import MAX_EXIT_FIELDS, ChatRequest, CompletionRequest, GenerationFields
from nemo_ee.server.requests.unsupported import HARMLESS, UNSUPPORTED
from nemo_ee.server.served_model import ServedModel
from nemo_ee.server.settings import ServerConfig

Schema = dict[str, Any]
REFERENCE = "#/components/schemas/{model}"
NULL: Schema = {"type": "null"}


def request_schemas(model: ServedModel, config: ServerConfig) -> dict[str, Schema]:
    """By name, those that they refer to included."""
    schemas: dict[str, Schema] = {"EarlyExit": _exits(model)}
    for kind in (CompletionRequest, ChatRequest):
        schema = copy.deepcopy(kind.model_json_schema(ref_template=REFERENCE))
        schemas |= schema.pop("$defs", {})
        schemas[kind.__name__] = _request(kind, schema, model, config)
    schemas["Message"]["additionalProperties"] = NULL  # as answers that are sent back have
    return schemas


def _request(
    kind: type[GenerationFields], schema: Schema, model: ServedModel, config: ServerConfig
) -> Schema:
    properties = schema["properties"]
    properties["model"]["enum"] = [model.name]
    properties["n"]["maximum"] = config.max_choices
    properties["early_exit"] = {"anyOf": [{"$ref": REFERENCE.format(model="EarlyExit")}, {"type": "boolean"}]}
    properties["stop_token_ids"]["items"] = _token(model)
    if kind is CompletionRequest:
        _limit_prompts(properties["prompt"], model, config)
    for name, values in properties.items():
        if name not in schema["required"]:
            properties[name] = _or_null(values)
    for name in HARMLESS:
        properties.setdefault(name, {"description": "accepted, and changes nothing"})
    for name, (neutral, reason) in UNSUPPORTED.items():
        properties.setdefault(name, {"enum": [*neutral, None], "description": reason})
    return {**schema, "additionalProperties": NULL}


def _limit_prompts(prompt: Schema, model: ServedModel, config: ServerConfig) -> None:
    text, texts, ids, lists = prompt["anyOf"]
    text["minLength"] = 0 if model.tokenizer.encode("") else 1  # a BOS is a prompt
    text["maxLength"] = CHARACTERS_PER_TOKEN * model.context_length
    ids |= {"items": _token(model), "maxItems": model.context_length}
    texts |= {"items": dict(text), "maxItems": config.max_choices}
    lists |= {"items": dict(ids), "maxItems": config.max_choices}


def _token(model: ServedModel) -> Schema:
    return {"type": "integer", "minimum": 0, "maximum": model.vocabulary - 1}


def _exits(model: ServedModel) -> Schema:
    """Of `ExitOptions`, for the exits that there are and what the server leaves to a request."""
    usual, layers = model.usual, list(model.early_exit.layers)
    threshold: Schema = {"type": "number", "minimum": 0, "maximum": 1}
    described: dict[str, Schema] = {
        "threshold": {"anyOf": [threshold, {"type": "array", "items": threshold, "maxItems": len(layers)}]},
        "exits": {
            "type": "array",
            "items": {"enum": layers},
            "uniqueItems": True,
            "description": "ascending",
        },
        "max_pending": {"type": "integer", "minimum": 0},
        "lossless": {"type": "boolean"},
        "always": {"type": "boolean"},
        "confidence": {"enum": [usual.confidence]},
        "kv_policy": {"enum": [usual.kv_policy]},
    }
    names = [field.name for field in dataclasses.fields(ExitOptions)]
    return {
        "title": "EarlyExit",
        "description": "When tokens may leave; what is left out is the server's, null the checkpoint's.",
        "type": "object",
        "properties": {name: _or_null(described[name]) for name in names},
        "maxProperties": MAX_EXIT_FIELDS,
        "additionalProperties": NULL,
    }


def _or_null(schema: Schema) -> Schema:
    about = {key: value for key, value in schema.items() if key in ("title", "default", "description")}
    rest = {key: value for key, value in schema.items() if key not in about}
    options = rest["anyOf"] if "anyOf" in rest else [rest]
    return {**about, "anyOf": options if NULL in options else [*options, NULL]}
