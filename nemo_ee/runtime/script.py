# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What every script does around its work: the CPU runtime where there is no GPU, and errors as one clear text."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from nemo_ee.errors import CheckpointError, ConfigError, DataError, GenerationError
from nemo_ee.runtime import cpu


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns errors that are meant for users into `error: …` and exit status 1; enables the CPU runtime first."""
    cpu.enable()
    _quieten_nemo()
    try:
        yield
    except (CheckpointError, ConfigError, DataError, GenerationError) as error:
        sys.exit(f"error: {error}")


def _quieten_nemo() -> None:
    """Drops NeMo's warning, about a hundred lines a start, of megatron-core fields that keep their defaults."""
    from nemo.utils import logging

    logging._logger.addFilter(lambda record: "does not have field.name" not in record.getMessage())
