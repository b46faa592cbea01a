# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Slow, silent and many connections: they end in time, and nobody else notices them."""

import json
import os
import resource
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from nemo_ee.errors import ConfigError
from nemo_ee.server.connections import open_files
from nemo_ee.server.connections.lobby import Lobby, Waiting
from nemo_ee.server.serve import SPARE_CONNECTIONS
from tests.support.fake_session import FakeSession
from tests.support.server import fake_service, serving, until

SECONDS = 0.4
"""The servers' `receive_timeout_s`."""
LATE = 5.0
"""By then what has a time limit must have ended."""
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
PAGE, PAGES = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 2000
"""Together some 20 MB of answers, more than all buffers hold."""
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def server():
    session = FakeSession(slots=2)
    service = fake_service(session, receive_timeout_s=SECONDS, context_length=2000)
    with serving(service) as running:
        running.session, running.service = session, service
        yield running


@contextmanager
def connected(server, first=b""):
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=LATE) as connection:
        connection.sendall(first)
        yield connection


def rest_of(connection):
    """All that comes until the server closes the connection."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def first_answer(connection, status=200, end=b"}"):
    """To `HEALTH`, or to a request that is refused; no more than that."""
    answer = b""
    while not answer.endswith(end):
        assert (part := connection.recv(4096)), answer
        answer += part
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    return answer


def healthy(server):
    answer = httpx.get(f"{server.url}/health", timeout=LATE)
    assert answer.status_code == 200 and answer.json()["status"] == "ok"


def completes(server):
    body = {"model": "tiny", "prompt": "w1 w2", "max_tokens": 3}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=LATE)
    assert answer.status_code == 200, answer.text


def error_in(answer, status):
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()) and b"application/json" in head
    return json.loads(body)["error"]


@pytest.mark.parametrize("begun", [b"", b"GET /he"], ids=["silent", "unfinished"])
def test_400_connections_that_ask_nothing_keep_nobody_out(server, begun):
    """More than may be open at a time."""
    assert server.lobby.most == 2 + 16 + SPARE_CONNECTIONS < 400
    with ExitStack() as stack:
        waiting = [stack.enter_context(connected(server, begun)) for _ in range(400)]
        for _ in range(3):
            healthy(server)
            completes(server)
        until(lambda: len(server.lobby) == 0, LATE)
        told = [error_in(answer, 408)["code"] for answer in map(rest_of, waiting) if answer]
    assert told == (["timeout"] * len(told)) and bool(told) == bool(begun)
    healthy(server)


def test_idle_connections_give_way_to_those_that_ask(server):
    with ExitStack() as stack:
        for _ in range(server.lobby.most):
            idle = stack.enter_context(connected(server, HEALTH))
            first_answer(idle)
        assert len(server.lobby) == server.lobby.most
        for _ in range(3):
            healthy(server)
        assert len(server.lobby) <= server.lobby.most


def test_an_answer_on_its_way_is_not_given_up_for_newcomers(server):
    server.session.step_seconds = 0.002
    body = json.dumps({"model": "tiny", "prompt": "w1", "max_tokens": 300, "stream": True}).encode()
    try:
        with (
            connected(server, HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body) as asking,
            ExitStack() as stack,
        ):
            until(lambda: server.service.engine.running == 1)
            for _ in range(server.lobby.most + 50):
                stack.enter_context(connected(server, b"GET"))
            answer = b""
            while b"[DONE]" not in answer:
                assert (part := asking.recv(65536)), answer[-300:]
                answer += part
    finally:
        server.session.step_seconds = 0.0


def trickle(connection, text, pause=0.05):
    """Sends byte by byte, for as long as the server takes it."""
    for n in range(len(text)):
        try:
            connection.sendall(text[n : n + 1])
        except OSError:
            return
        time.sleep(pause)


@pytest.mark.parametrize("before", [b"", HEALTH], ids=["first", "second"])
def test_headers_that_come_byte_by_byte_are_late(server, before):
    """So are those of a later request of a connection."""
    with connected(server, before) as connection:
        if before:
            first_answer(connection)
            time.sleep(2 * SECONDS)  # idle connections have a longer time
        began = time.monotonic()
        trickle(connection, b"GET /health HTTP/1.1\r\nX-Much: " + b"x" * 100)
        assert "headers did not arrive within 0.4 s" in error_in(rest_of(connection), 408)["message"]
        assert time.monotonic() - began < LATE + 3


@pytest.mark.parametrize("more", [b"", b" " * 20], ids=["stalled", "byte by byte"])
def test_bodies_that_do_not_arrive_are_late(server, more):
    with connected(server, HEAD + b"Content-Length: 1000\r\n\r\n{") as connection:
        began = time.monotonic()
        trickle(connection, more)
        assert (
            "body did not arrive within 0.4 s"
            in error_in(first_answer(connection, 408, b"}}"), 408)["message"]
        )
        assert SECONDS / 2 < time.monotonic() - began < LATE


def test_a_body_behind_its_answer_ends(server):
    """The refusal does not wait for the body, and the body not for ever."""
    with connected(
        server, b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    ) as connection:
        first_answer(connection, 404, b"}}")
        trickle(connection, b" " * 100)
        assert rest_of(connection) == b""


def test_what_is_no_http_is_told_so(server):
    with connected(server, b"\x16\x03\x01\x02\x00 hello\r\n\r\n") as connection:
        assert error_in(rest_of(connection), 400)["code"] == "invalid_http"
    with connected(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n") as connection:
        assert error_in(rest_of(connection), 400)["code"] == "invalid_http"


def test_connections_that_are_kept_go_on(server):
    with httpx.Client(base_url=server.url, timeout=LATE) as client:
        ports = set()
        for pause in (0.0, 0.1, 2 * SECONDS, 0.0):
            time.sleep(pause)
            answer = client.get("/health")
            assert answer.status_code == 200
            ports.add(answer.extensions["network_stream"].get_extra_info("client_addr")[1])
        assert len(ports) == 1, "one connection for all"


def test_clients_that_never_read_are_cut_off(server):
    """Each asks for the page until the answers fill all buffers."""
    with ExitStack() as stack:
        for _ in range(5):
            connection = stack.enter_context(connected(server))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(0.3)
            try:
                connection.sendall(PAGE * PAGES)
            except TimeoutError:
                pass
        until(lambda: server.lobby.count(Waiting.READER) == 5)
        healthy(server)
        completes(server)
        until(lambda: len(server.lobby) == 0, LATE)


def test_a_client_that_reads_slowly_gets_all(server):
    """Longer than the limit in all, with no pause as long."""
    with connected(server, PAGE * PAGES) as connection:
        until(lambda: server.lobby.count(Waiting.READER) == 1)
        answers, began = [], time.monotonic()
        while time.monotonic() - began < 3 * SECONDS:
            time.sleep(SECONDS / 4)
            answers.append(connection.recv(2**18, socket.MSG_WAITALL))
        connection.shutdown(socket.SHUT_WR)
        text = b"".join([*answers, rest_of(connection)])
    assert text.count(b"HTTP/1.1 200") == PAGES


class Guest:
    """A connection that notes whether it had to leave."""

    gone = False

    def leave(self):
        self.gone = True


def test_who_has_to_leave():
    lobby, guests = Lobby(5), [Guest() for _ in range(5)]
    for guest in guests:
        lobby.enter(guest)
    busy, idle, reader, first, second = guests
    lobby.place(busy, None)
    lobby.place(idle, Waiting.NOTHING)
    lobby.place(reader, Waiting.READER)
    left = []
    for expected in (first, second):
        newcomer = Guest()
        lobby.enter(newcomer)
        lobby.place(newcomer, None)
        left.append(expected.gone)
    assert left == [True, True] and not reader.gone, "those that have asked nothing, the oldest first"
    for expected in (reader, idle):
        newcomer = Guest()
        lobby.enter(newcomer)
        lobby.place(newcomer, None)
        assert expected.gone
    late = Guest()
    lobby.enter(late)
    assert late.gone and not busy.gone and len(lobby) == 5, "all are busy"
    lobby.place(late, Waiting.NOTHING)
    lobby.forget(late)
    assert len(lobby) == 5 and lobby.count(Waiting.NOTHING) == 0


def test_waiting_begins_anew_with_every_change():
    lobby, first, second = Lobby(2), Guest(), Guest()
    lobby.enter(first)
    lobby.enter(second)
    for waiting in (None, Waiting.REQUEST):
        lobby.place(first, waiting)
    lobby.place(first, Waiting.REQUEST)
    lobby.enter(Guest())
    assert second.gone and not first.gone


class System:
    """The operating system as `open_files` sees it; notes which limits it sets."""

    RLIMIT_NOFILE, RLIM_INFINITY = resource.RLIMIT_NOFILE, resource.RLIM_INFINITY

    def __init__(self, soft, hard, used=40):
        self.limits, self.used, self.found = (soft, hard), used, []

    def getrlimit(self, _):
        return self.limits

    def setrlimit(self, _, limits):
        self.found.append(limits)

    def listdir(self, _):
        return range(self.used)


def on(monkeypatch, system):
    monkeypatch.setattr(open_files, "resource", system)
    monkeypatch.setattr(open_files, "os", system)
    return system


OTHERS = 40 + open_files.KEPT_FILES + open_files.ON_THE_WAY


@pytest.mark.parametrize(
    "soft, hard, most, raised",
    [
        (1024, 1024, 300, []),
        (256, 4096, 300, [(OTHERS + 300, 4096)]),
        (256, -1, 300, [(OTHERS + 300, -1)]),
        (256, OTHERS + 120, 120, [(OTHERS + 120, OTHERS + 120)]),
        (-1, -1, 300, []),
    ],
)
def test_connections_leave_files_for_others(monkeypatch, soft, hard, most, raised):
    system = on(monkeypatch, System(soft, hard))
    assert open_files.connections_within_limit(300, 100) == most
    assert system.found == raised


def test_too_few_files_are_told(monkeypatch):
    on(monkeypatch, System(256, 256))
    with pytest.raises(ConfigError, match=f"ulimit -Hn=256: .*root.*ulimit -Hn {OTHERS + 300} "):
        open_files.connections_within_limit(300, 100)


FLOOD = """
import resource, socket, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
held = [socket.create_connection((host, port), timeout=5) for _ in range(count)]
for one in held:
    try: one.sendall(b"GET /he")
    except OSError: pass
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def slow_turns(server):
    """Each turn of its event loop takes 20 ms longer, so that connections wait for it by the hundred."""
    loop, on = server.servers[0].get_loop(), True

    def turn():
        time.sleep(0.02)
        if on:
            loop.call_soon(turn)

    loop.call_soon_threadsafe(turn)
    yield
    on = False


def test_the_limit_of_open_files_stops_nobody(monkeypatch, caplog):
    """A process whose files are few and which cannot have more; 500 connections of another one."""
    monkeypatch.setattr(open_files, "ON_THE_WAY", 4 * 50)
    monkeypatch.setattr("nemo_ee.server.serve.BACKLOG", 50)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd"))
    few = used + open_files.KEPT_FILES + 4 * 50 + 60
    on(monkeypatch, System(few, few, used))
    service = fake_service(FakeSession(slots=2))
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        with serving(service) as server, slow_turns(server):
            assert server.lobby.most < 100
            command = [sys.executable, "-S", "-c", FLOOD, *server.url[7:].split(":"), "500"]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as flood:
                assert flood.stdout.readline() == b"ready\n"
                for _ in range(3):
                    healthy(server)
                flood.stdin.close()
                flood.wait(LATE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "out of system resource" not in caplog.text, "accepting would pause for a second"
