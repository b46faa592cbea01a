# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which names of the server are answered."""

from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from nemo_ee.server.errors import ApiError
from nemo_ee.server.json_response import AsciiResponse


class AllowedHosts:
    """Refuses requests whose `Host` header is none of some names.

    A page of another site can give its own name this machine's loopback address (DNS rebinding) and would then
    read the answers; its requests bear its own name.

    Args:
        app: what comes behind.
        names: hosts without ports; `*` for all.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str]):
        self._app, self._names = app, {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers 403."""
        if scope["type"] != "http" or "*" in self._names or _host(scope) in self._names:
            return await self._app(scope, receive, send)
        text = f"Host={_host(scope)}: not answered under this name; add it to allowed_hosts"
        error = ApiError(403, text, code="host_not_allowed")
        return await AsciiResponse(error.body(), error.status)(scope, receive, send)


def _host(scope: Scope) -> str:
    """The `Host` header without its port."""
    value = (
        next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1").lower()
    )
    name, _, port = value.rpartition(":")
    return name if name and port.isdigit() else value
