# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Ports where a run's processes meet."""

import os
import socket

import pytest

from nemo_ee.runtime import port


def test_a_launchers_port_stays(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "12345")
    port.choose_master_port()
    assert os.environ["MASTER_PORT"] == "12345"


def test_a_chosen_port_is_free_and_not_for_outgoing_connections(monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    port.choose_master_port()
    chosen = int(os.environ.pop("MASTER_PORT"))
    assert port.FIRST <= chosen <= port.LAST
    with socket.socket() as listener:
        listener.bind(("", chosen))


def test_taken_ports_are_passed_over(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        number = taken.getsockname()[1]
        monkeypatch.setattr(port, "FIRST", number)
        monkeypatch.setattr(port, "LAST", number + 50)
        assert port.free_port() != number
        monkeypatch.setattr(port.random.SystemRandom, "sample", lambda *_: [number])
        with pytest.raises(OSError, match="MASTER_PORT"):
            port.free_port()
