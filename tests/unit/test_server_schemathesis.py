# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""schemathesis against a server that listens: requests made from its own /openapi.json, right and wrong ones."""

import json

import pytest
import requests
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from nemo_ee.server.openapi.answers import ChatCompletionChunk, CompletionChunk, Error
from tests.support.fake_session import FakeSession
from tests.support.fuzz import fuzz
from tests.support.server import fake_service, listening

KEY = "sk-fuzz"
CHUNKS = {"/v1/completions": CompletionChunk, "/v1/chat/completions": ChatCompletionChunk}
OPERATIONS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/"),
    ("GET", "/openapi.json"),
]
