# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""JSON that any client can read, whatever was sent or generated."""

import json
from typing import Any

from starlette.responses import JSONResponse


def to_json(value: Any) -> bytes:
    """ASCII alone: other characters are escaped.

    Messages quote what was sent, which may hold halves of surrogate pairs: they have no encoding. And clients
    that split a stream's lines as Unicode has them would cut at a U+2028.

    Raises:
        ValueError: a number that is not finite.
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")


class AsciiResponse(JSONResponse):
    """An answer as `to_json` writes it."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return to_json(content)
