# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A port for the processes of a run to meet at."""

import os
import random
import socket

FIRST, LAST = 20000, 32767
"""Below the ports that Linux gives to outgoing connections."""


def choose_master_port() -> None:
    """Sets MASTER_PORT for this process and those it starts, unless a launcher has.

    Lightning asks the system for a port and gives it back before it listens there; in between a connection
    that any process opens may get it.
    """
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())


def free_port() -> int:
    """A port that nothing listens on, and that no outgoing connection is given.

    Raises:
        OSError: fifty ports drawn at random are all taken.
    """
    for port in random.SystemRandom().sample(range(FIRST, LAST), 50):
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port found within {FIRST} to {LAST}; set MASTER_PORT")
