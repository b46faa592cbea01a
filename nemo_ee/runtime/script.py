# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What every script does around its work: the CPU runtime without a GPU, and errors as one clear text."""

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from nemo_ee.errors import CheckpointError, ConfigError, DataError, Fault, GenerationError, RankMissingError
from nemo_ee.runtime import cpu
from nemo_ee.runtime.children import end_with_parent
from nemo_ee.runtime.operating_system import check_operating_system

end_with_parent()  # in a process of multiprocessing's, which imports its script, and so this, again

APEX_IS_MISSING = "Apex was not found"
"""How NeMo's ImportError begins where there is a GPU."""


@contextmanager
def user_errors(
    cfg: DictConfig | None = None, nemo: bool = True, optional: Collection[str] = ()
) -> Iterator[None]:
    """Turns errors that are meant for users into `error: …` and exit status 1.

    Args:
        cfg: a script's configuration; every mandatory key (`???`) that was not given is an error.
        nemo: enable the CPU runtime first, and quieten NeMo. False spares a script that does without NeMo its
            import.
        optional: mandatory keys that need not be given this time.
    """
    try:
        check_operating_system()
        _check_given(cfg, optional)
        if nemo:
            cpu.enable()
            _quieten_nemo()
        yield
    except (CheckpointError, ConfigError, DataError, GenerationError, RankMissingError) as error:
        sys.exit(f"error: {error}")
    except MissingMandatoryValue as error:
        sys.exit(f"error: {_missing(error.full_key)}")
    except ImportError as error:
        if APEX_IS_MISSING not in str(error):
            raise
        remedy = "set CUDA_VISIBLE_DEVICES= to run on the CPU, or use a NeMo Framework container"
        sys.exit(f"error: there is a GPU, but not Apex, without which NeMo does not use it; {remedy}")


def _check_given(cfg: DictConfig | None, optional: Collection[str]) -> None:
    missing = [] if cfg is None else list(_missing_keys(OmegaConf.to_container(cfg)))
    missing = [key for key in missing if key not in optional]
    if missing:
        raise ConfigError(*map(_missing, missing))


def _missing_keys(values: dict, section: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _missing_keys(value, f"{section}{key}.")
        elif value == "???":
            yield f"{section}{key}"


def _missing(key: str) -> Fault:
    return Fault(key, "???", "is required", f"set {key}=…")


def _quieten_nemo() -> None:
    """Drops NeMo's hundred lines of warnings about megatron-core fields that keep their defaults."""
    from nemo.utils import logging

    logging._logger.addFilter(lambda record: "does not have field.name" not in record.getMessage())
