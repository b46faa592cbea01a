# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which names of the server are answered."""

import ipaddress
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from nemo_ee.server.answers.errors import ApiError
from nemo_ee.server.answers.json_response import AsciiResponse
from nemo_ee.server.settings import ADDRESSES, ALL_HOSTS


class AllowedHosts:
    """Refuses requests whose `Host` header is none of some names.

    A page of another site can give its own name this machine's address (DNS rebinding) and would then read the
    answers; its requests bear its own name, never an address.

    Args:
        app: what comes behind.
        names: hosts without ports; also `ALL_HOSTS`, `ADDRESSES`.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str]):
        self._app, self._names = app, {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers 403."""
        if scope["type"] != "http" or self._answers(host := _host(scope)):
            return await self._app(scope, receive, send)
        text = f"Host={host}: not answered under this name; add it to allowed_hosts"
        error = ApiError(403, text, code="host_not_allowed")
        return await AsciiResponse(error.body(), error.status)(scope, receive, send)

    def _answers(self, host: str) -> bool:
        return (
            ALL_HOSTS in self._names
            or host in self._names
            or (ADDRESSES in self._names and _is_address(host))
        )


def _host(scope: Scope) -> str:
    """The `Host` header without its port."""
    value = (
        next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1").lower()
    )
    name, _, port = value.rpartition(":")
    return name if name and port.isdigit() else value


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True
