# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Errors that clients see, in OpenAI's form."""

import logging
from typing import Any

from nemo_ee.errors import ConfigError

PREFIXES = ("length_params.", "sampling_params.")
"""Of `parse_request`'s keys, where a client's field has none."""
LONGEST_MESSAGE = 1000
"""Characters; messages quote what was sent."""
logger = logging.getLogger("nemo_ee.server")


class ApiError(Exception):
    """A request that is not answered as asked.

    Args:
        status: of HTTP.
        message: what is wrong and what to do instead.
        param: the field at fault.
        code: a word for programs, e.g. "queue_full".
        retry_after_s: when to try again, in seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ):
        if len(message) > LONGEST_MESSAGE:
            message = message[:LONGEST_MESSAGE] + "…"
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    @classmethod
    def from_faults(cls, error: ConfigError) -> "ApiError":
        """400 for what `parse_request` found; `param` is the first fault's field."""
        texts = [_as_field(str(fault)) for fault in error.faults]
        return cls(400, "\n".join(texts), _as_field(error.faults[0].key), "invalid_value")

    @classmethod
    def from_failure(cls, error: Exception) -> "ApiError":
        """What a client is told of any error; one that should not have come up is logged."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, TimeoutError):  # the engine was busy for long, or nobody reads
            return cls(504, "the request's time was up", code="timeout")
        logger.error("a request failed", exc_info=error)
        return cls(500, "the server failed; its log says why", code="internal_error")

    def body(self) -> dict[str, Any]:
        """OpenAI's JSON object."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """`Retry-After`, if it is worth while; how to say who one is, where that is asked for."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return {**headers, "WWW-Authenticate": "Bearer"} if self.status == 401 else headers


class ClientGone(Exception):
    """The client has closed the connection; nobody waits for an answer."""


def _as_field(text: str) -> str:
    prefix = next((p for p in PREFIXES if text.startswith(p)), "")
    return text[len(prefix) :]
