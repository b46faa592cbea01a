# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Reading a request's body within limits."""

import asyncio

from starlette.requests import ClientDisconnect, Request

from nemo_ee.server.answers.errors import ApiError, ClientGone

DISCARDED = 8
"""How many times `max_bytes` are read of a body that is too long: a connection that is closed while its client
still sends loses the answer."""


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body.

    Raises:
        ApiError: 415 if it is not declared as JSON (which also keeps other sites' pages from posting forms to a
            server on the user's machine), 413 if it is too long, 408 if it takes too long to arrive.
        ClientGone: the connection was closed within it.
    """
    body, length = bytearray(), 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                length += len(part)
                if length <= max_bytes:
                    body += part
                elif length > DISCARDED * max_bytes:
                    break
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {timeout_s:g} s", code="timeout") from error
    except ClientDisconnect as error:
        raise ClientGone from error
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        text = f"Content-Type is {kind or 'missing'}; send application/json"
        raise ApiError(415, text, code="unsupported_media_type")
    if length > max_bytes:
        raise ApiError(413, f"the body exceeds the server's {max_bytes} bytes; send less", code="too_large")
    return bytes(body)
