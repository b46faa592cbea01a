# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Who is connected and waits, and who has to leave when there are too many."""

from collections import OrderedDict
from enum import Enum
from typing import Protocol


class Waiting(Enum):
    """What a connection waits for while the server has nothing to do for it, in the order they have to leave."""

    REQUEST = "its client has not sent a whole request"
    READER = "its client does not read"
    NOTHING = "its requests are answered; it is kept for the next one"


class Leaves(Protocol):
    """A connection, as the lobby sees it."""

    def leave(self) -> None: ...


class Lobby:
    """All connections of a server. When there are as many as may be, one that waits makes room for the next.

    A connection whose request is being answered never has to leave. So nobody takes another one's place by being
    connected: those that ask something find one.

    Args:
        most: connections at a time.
    """

    def __init__(self, most: int):
        self.most = most
        self._places: dict[Leaves, Waiting | None] = {}
        self._waiting: dict[Waiting, OrderedDict[Leaves, None]] = {kind: OrderedDict() for kind in Waiting}

    def __len__(self) -> int:
        return len(self._places)

    def count(self, waiting: Waiting) -> int:
        """How many wait for that."""
        return len(self._waiting[waiting])

    def enter(self, connection: Leaves) -> None:
        """A new one. If it is one too many, the one leaves that has waited longest: see `Waiting`."""
        if len(self._places) >= self.most:
            waiting = next((those for those in self._waiting.values() if those), None)
            other = next(iter(waiting)) if waiting else connection
            self.forget(other)
            other.leave()
            if other is connection:
                return
        self._places[connection] = None
        self.place(connection, Waiting.REQUEST)

    def place(self, connection: Leaves, waiting: Waiting | None) -> None:
        """Notes what it waits for; None while it is answered. One that has left stays away."""
        before = self._places.get(connection, waiting)
        if before is waiting:
            return
        if before is not None:
            del self._waiting[before][connection]
        if waiting is not None:
            self._waiting[waiting][connection] = None
        self._places[connection] = waiting

    def forget(self, connection: Leaves) -> None:
        """It is closed."""
        waiting = self._places.pop(connection, None)
        if waiting is not None:
            del self._waiting[waiting][connection]
