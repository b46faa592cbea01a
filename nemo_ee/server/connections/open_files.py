# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""How many connections the operating system's limit of open files leaves room for."""

import os
import resource

from nemo_ee.errors import ConfigError, Fault

BACKLOG = 128
"""Connections that one turn of asyncio's event loop accepts."""
ON_THE_WAY = 4 * BACKLOG
"""Connections that are accepted before the file of the first of them is closed, if it has to leave: of one turn each
that waits to be accepted, is given its transport, enters the lobby and is closed."""
KEPT_FILES = 32
"""For all else that a running server opens."""


def connections_within_limit(wanted: int, least: int) -> int:
    """Connections at a time that cannot use up the process's files: a server that has none left answers nobody.

    Raises the process's own limit as far as that needs and its administrator allows.

    Args:
        wanted: how many there should be.
        least: how many there must be.

    Raises:
        ConfigError: there is no room for the least.
    """
    others = len(os.listdir("/dev/fd")) + KEPT_FILES + ON_THE_WAY
    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return wanted
    if limit < others + wanted:
        limit = others + wanted if highest == resource.RLIM_INFINITY else min(others + wanted, highest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, highest))
    if limit - others < least:
        rule = f"the hard limit of open files leaves no room for {least} connections"
        remedy = f"have root raise it (ulimit -Hn {others + wanted} in the shell that starts this), or lower queue_size"
        raise ConfigError(Fault("ulimit -Hn", limit, rule, remedy))
    return min(wanted, limit - others)
