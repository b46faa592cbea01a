# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""uvicorn's HTTP/1.1 connection with time limits for its client."""

import asyncio
import fcntl
import sys
import termios
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from nemo_ee.server.answers.errors import ApiError
from nemo_ee.server.answers.json_response import to_json
from nemo_ee.server.connections.lobby import Lobby, Waiting


class Connection(H11Protocol):
    """A connection that its client can neither keep waiting for a request nor keep from ending.

    uvicorn sets no time for headers, nor for reading an answer. Here the first byte of a request (or the connection
    itself) starts a clock that the end of its headers stops; how long its body takes is `read_body`'s to say. A
    client that has not read a byte for as long is cut off, also while the connection is being closed.

    Args:
        lobby: where it is listed.
        receive_timeout_s: seconds for headers, and without a byte read.
        uvicorn: what uvicorn gives its protocols.
    """

    def __init__(self, lobby: Lobby, receive_timeout_s: float, **uvicorn: Any):
        super().__init__(**uvicorn)
        self._lobby, self._timeout_s = lobby, receive_timeout_s
        self._headers_late: asyncio.TimerHandle | None = None
        self._reader_late: asyncio.TimerHandle | None = None
        self._unread = 0

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # pause_writing as soon as the client does not keep up
        self._lobby.enter(self)
        self._settle()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._lobby.forget(self)
        for timer in (self._headers_late, self._reader_late):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        self._settle()

    def on_response_complete(self) -> None:
        """An answer is sent, or as much of it as the client reads."""
        super().on_response_complete()
        self._settle()

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().pause_writing()
        self._expect_reading()
        self._settle()

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().resume_writing()
        if self._reader_late is not None:
            self._reader_late.cancel()
            self._reader_late = None
        self._settle()

    def leave(self) -> None:
        """Makes room for another one, at once."""
        self.transport.abort()

    def _settle(self) -> None:
        """Notes what the connection waits for, and whether the clock for headers runs."""
        waiting = self._waits_for()
        self._lobby.place(self, waiting)
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering or waiting is Waiting.NOTHING:  # uvicorn has a clock of its own for the latter
            if self._headers_late is not None:
                self._headers_late.cancel()
                self._headers_late = None
        elif self._headers_late is None:
            self._headers_late = self.loop.call_later(self._timeout_s, self._end_late_request)

    def _waits_for(self) -> Waiting | None:
        if self.flow.write_paused:
            return Waiting.READER
        if self.cycle is None:
            return Waiting.REQUEST
        if not self.cycle.response_complete:
            return Waiting.REQUEST if self.cycle.more_body else None
        begun = (
            self.conn.trailing_data[0] or self.conn.their_state is h11.SEND_BODY
        )  # of one already answered
        return Waiting.REQUEST if begun else Waiting.NOTHING

    def _end_late_request(self) -> None:
        """Closes the connection; one that has begun a request is told."""
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            self._refuse(408, f"the request's headers did not arrive within {self._timeout_s:g} s", "timeout")
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP, as all other errors."""
        self._refuse(400, msg, "invalid_http")
        self.transport.close()

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Sends an error that no request's answer stands in the way of."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        body = to_json(ApiError(status, message, code=code).body())
        headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
        reason = HTTPStatus(status).phrase
        answer = h11.Response(status_code=status, headers=[*headers, ("connection", "close")], reason=reason)
        for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))

    def _expect_reading(self) -> None:
        self._unread = self._count_unread()
        self._reader_late = self.loop.call_later(self._timeout_s, self._end_if_unread)

    def _end_if_unread(self) -> None:
        """Cuts off a client that has read nothing since the clock was started."""
        if self._count_unread() < self._unread:
            self._expect_reading()
        else:
            self.transport.abort()

    def _count_unread(self) -> int:
        """Bytes that wait here or in the kernel, which tells of room only when much of it is free again."""
        socket = self.transport.get_extra_info("socket")
        queued = fcntl.ioctl(socket.fileno(), termios.TIOCOUTQ, bytes(4))
        return self.transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)
