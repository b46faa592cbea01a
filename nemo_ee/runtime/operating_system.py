# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The operating systems that nemo_ee runs on: Linux."""

import platform

from nemo_ee.errors import ConfigError, Fault

NAMES = {"Darwin": "macOS"}
"""What users call a system that calls itself otherwise."""


def check_operating_system() -> None:
    """Refuses any but Linux.

    Raises:
        ConfigError: another one. megatron-core is published for Linux alone.
    """
    if (system := platform.system()) != "Linux":
        remedy = "use Linux or a container (docs/containers.md)"
        raise ConfigError(Fault("system", NAMES.get(system, system), "is not supported", remedy))
