# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The key that clients send, as OpenAI's do: `Authorization: Bearer …`."""

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from nemo_ee.server.answers.errors import ApiError
from nemo_ee.server.answers.json_response import AsciiResponse

OPEN_PATHS = frozenset({"/", "/health", "/openapi.json"})
"""Answered without a key: the page, which asks for it; what load balancers ask; the description of all the others."""


class RequiresKey:
    """Refuses requests without the key, before anything of their bodies is read.

    Args:
        app: what comes behind.
        key: the key; None asks nobody.
    """

    def __init__(self, app: ASGIApp, key: str | None):
        self._app, self._key = app, None if key is None else key.encode("ascii")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers 401."""
        if scope["type"] != "http" or self._key is None or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(sent) == 1 and _has_key(sent[0], self._key):
            return await self._app(scope, receive, send)
        text = "the API key is wrong" if sent else "this server asks for an API key"
        text += "; send the server's own as the header Authorization: Bearer …"
        error = ApiError(401, text, code="invalid_api_key")
        return await AsciiResponse(error.body(), error.status, error.headers())(scope, receive, send)


def _has_key(header: bytes, key: bytes) -> bool:
    """Takes as long for a key that is nearly right as for any other of its length."""
    scheme, _, sent = header.partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(sent.strip(b" "), key)
