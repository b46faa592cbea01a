# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What every script does around its work: its command line, stand-ins for what the machine lacks, clear errors."""

import functools
import logging
import os
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import NoReturn

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from nemo_ee.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Fault,
    GenerationError,
    OutputError,
    RankMissingError,
    TrainingError,
    printable,
)
from nemo_ee.files.write_errors import disk_error, output_error
from nemo_ee.runtime import stand_ins
from nemo_ee.runtime.children import end_with_parent
from nemo_ee.runtime.commands import as_installed
from nemo_ee.runtime.operating_system import check_operating_system

end_with_parent()  # in a process of multiprocessing's, which imports its script, and so this, again

_FOR_USERS = (
    CheckpointError,
    ConfigError,
    DataError,
    GenerationError,
    OutputError,
    RankMissingError,
    TrainingError,
)


def script(
    config_name: str, check: Callable[[str], None] | None = None, alone: bool = False
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Makes a function of a file in ``scripts/`` a Hydra program with a configuration of ``conf/``.

    Its command line may hold names of files as they are, see :mod:`nemo_ee.runtime.command_line`.

    Args:
        config_name: of the file in ``conf/``.
        check: is called with it before Hydra reads the command line; None checks that the file has all keys.
        alone: one process does the work, and nobody waits for it: SIGTERM ends it as Ctrl-C does, so that what it has
            half written goes at once. Not for what spends minutes in one call of native code, which either waits for.
    """

    def decorate(task: Callable[[DictConfig], None]) -> Callable[[], None]:
        run = hydra.main(version_base=None, config_path="../conf", config_name=config_name)(task)

        @functools.wraps(task)
        def main() -> None:
            from nemo_ee.runtime.command_line import check_keys, quote_paths

            sys.excepthook = _ended
            if alone and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
            with user_errors(nemo=False):
                sys.argv[1:] = quote_paths(sys.argv[1:])
                (check or check_keys)(config_name)
            run()

        return main

    return decorate


@contextmanager
def user_errors(
    cfg: DictConfig | None = None, nemo: bool = True, optional: Collection[str] = ()
) -> Iterator[None]:
    """Turns errors that are meant for users into `error: …` and exit status 1.

    With HYDRA_FULL_ERROR=1, Hydra's own switch, the traceback comes before it.

    Args:
        cfg: a script's configuration; every mandatory key (`???`) that was not given is an error.
        nemo: supply first what NeMo lacks on this machine, and quieten NeMo. False spares a script that does
            without NeMo its import.
        optional: mandatory keys that need not be given this time.
    """
    try:
        check_operating_system()
        _check_given(cfg, optional)
        if nemo:
            stand_ins.enable()
            _quieten_nemo()
        yield
    except _FOR_USERS as error:
        _end(printable(error))
    except MissingMandatoryValue as error:
        _end(str(_missing(error.full_key)))
    except ImportError as error:
        if not _raised_in("apex", error):
            raise
        # NeMo does without an Apex that is not there, and PyPI has another package of that name.
        remedy = "pip uninstall apex, or install NVIDIA's (https://github.com/NVIDIA/apex)"
        _end(f"Apex is installed, but cannot be imported ({error}); {remedy}")
    except Exception as error:
        if (cause := disk_error(error)) is None:
            raise
        _end(str(output_error(cause.filename or "an output", cause)))


def _end(message: str) -> NoReturn:
    """Ends the script with what the error being handled says to users."""
    if _full_errors():
        traceback.print_exc()
    sys.exit(f"error: {as_installed(message)}")


def _full_errors() -> bool:
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def _ended(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt) and not _full_errors():
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _thread_ended(args: threading.ExceptHookArgs) -> None:
    if _full_errors() or disk_error(args.exc_value) is None:
        threading.__excepthook__(args)


def _raised_in(package: str, error: ImportError) -> bool:
    """Whether modules of a package were being imported when the error came up."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(f"{module}.".startswith(f"{package}.") for module in modules)


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
    """Drops NeMo's hundred lines of warnings about megatron-core fields that keep their defaults.

    And tracebacks of what its log file and TensorBoard's thread, on a full disk, do not take; the next output says it
    once.
    """
    from nemo.utils import logging as nemo_logging

    logging.raiseExceptions = _full_errors()
    threading.excepthook = _thread_ended
    nemo_logging._logger.addFilter(lambda record: "does not have field.name" not in record.getMessage())
