# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Processes that end with the process that started them, however that ends, and not before."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

SECONDS = 1.0
"""How long a process may outlive its parent."""

STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""What announces a job's end, as `sbatch --signal=TERM@300`, torchrun and cloud machines do. Windows lacks the latter:
this module can be imported there all the same, so that scripts can say that it is not supported."""


def end_with_parent() -> None:
    """Ends this process when its parent has gone, if multiprocessing started it; otherwise does nothing.

    megatron-core's checkpoint writer starts a manager process, which waits for its rank for ever where that was
    killed and could not say goodbye.
    """
    if multiprocessing.current_process().name == "MainProcess":
        return
    outlive_signals()
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def outlive_signals(_worker: int = 0) -> None:
    """Has this process ignore what announces a job's end: its parent still needs it to write a checkpoint.

    Signals reach whole process groups from `timeout`, systemd, and some of SLURM's set-ups.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def children_outlive_signals() -> Iterator[None]:
    """Processes that are started within never hear what announces a job's end: they inherit a mask.

    This process may still hear it, in a thread that was there before.
    """
    resource_tracker.ensure_running()  # which multiprocessing would start within, and let signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS)
    os._exit(1)
