# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The way back from the engine's thread to the request's coroutine."""

import asyncio

from nemo_ee.server.answers.delta import Delta


class Reply:
    """What has come of a request's choices and was not taken yet. Lives on its event loop.

    A reader that is slow finds all that came since in one delta, so it never holds more than the request's
    tokens, and the engine never waits for it.

    Args:
        choices: how many there are.
    """

    def __init__(self, choices: int):
        self.loop = asyncio.get_running_loop()
        self._new: dict[int, Delta] = {}
        self._open = choices
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    @property
    def done(self) -> bool:
        """Whether all choices have ended and were taken."""
        return self._open == 0 and not self._new

    def put(self, choice: int, delta: Delta) -> None:
        """Adds what has come of one choice."""
        if choice in self._new:
            self._new[choice].extend(delta)
        else:
            self._new[choice] = delta
        self._open -= delta.finish_reason is not None
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """Ends it: `take` raises when what came before is taken. The first error counts."""
        self._error = self._error or error
        self._changed.set()

    async def take(self) -> dict[int, Delta]:
        """What has come of each choice since the last call; waits until there is something.

        Raises:
            ApiError, ClientGone: what `fail` was told.
        """
        await self._changed.wait()
        new, self._new = self._new, {}
        if self._error is None:
            self._changed.clear()
        elif not new:
            raise self._error
        return new
