# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Processes that end with the process that started them, however that ends, and not before."""

import ctypes
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 1.0
"""How long a process may outlive its parent."""

STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""What announces a job's end, as `sbatch --signal=TERM@300`, torchrun and cloud machines do. Windows lacks the latter:
this module can be imported there all the same, so that scripts can say that it is not supported."""

_PR_SET_PDEATHSIG = 1

_watching = 0
"""The process that watches its parent: this one, or one that this was forked from."""
_binds_forked = 0
"""While it saves a checkpoint: this process, whose forked children are to end with it."""
_prctl = None


def end_with_parent(_worker: int = 0) -> None:
    """Ends this process when its parent has gone, if multiprocessing started it; otherwise does nothing.

    Who waits for a parent that was killed, and could not say goodbye, waits for ever: a pool's workers hold each
    other's pipes open.
    """
    global _watching
    if multiprocessing.current_process().name == "MainProcess" or _watching == os.getpid():
        return
    _watching = os.getpid()
    outlive_signals()
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def outlive_signals() -> None:
    """Has this process ignore what announces a job's end: its parent still needs it to write a checkpoint.

    Signals reach whole process groups from `timeout`, systemd, and some of SLURM's set-ups.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def writing_checkpoint() -> Iterator[None]:
    """Around megatron-core's saving, if it is not in the background: what it starts ends with this process, not before.

    Its writers are forked. They inherit a mask, so they never hear what announces a job's end; this process may still
    hear it, in a thread that was there before. They end with this process, and do not write on into a checkpoint that
    the run's next start deletes. Their results are kept in this process: megatron-core would start one more for that,
    a manager that imports all that its script does, and that nothing ends where this process is killed.
    """
    global _binds_forked, _prctl
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if _prctl is None:
        _prctl = ctypes.CDLL(None).prctl
        os.register_at_fork(after_in_child=_end_with_parent_if_bound)
    results, filesystem_async._results_queue = filesystem_async._results_queue, _Results()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    bound, _binds_forked = _binds_forked, os.getpid()
    try:
        yield
    finally:
        _binds_forked = bound
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        filesystem_async._results_queue.close()
        filesystem_async._results_queue = results


def _end_with_parent_if_bound() -> None:
    """In a child that was just forked. The signal comes at the end of the forking thread, too; that waits for it."""
    global _binds_forked
    if _binds_forked and _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != _binds_forked:
            os._exit(1)
        _binds_forked = os.getpid()  # of those that it forks itself


def _watch(parent: int) -> None:
    while os.getppid() == parent and _parent_exists():
        time.sleep(SECONDS)
    os._exit(1)


def _parent_exists() -> bool:
    """False where it had gone before this process asked who it is; known once multiprocessing has started up."""
    parent = multiprocessing.parent_process()
    return parent is None or parent.is_alive()


class _Results:
    """A queue from processes that this one forks: a file in memory, which unlike a pipe has room for all that is put.

    Has what megatron-core calls of multiprocessing's queues.
    """

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("nemo_ee_results"), "r+b", buffering=0)

    def put(self, item: Any) -> None:
        """Adds an item; an exception that does not pickle as its text."""
        try:
            packed = pickle.dumps(item)
            pickle.loads(packed)
        except Exception:
            packed = pickle.dumps(RuntimeError(f"{type(item).__name__}: {item}"))
        self._file.write(packed)

    def get_nowait(self) -> Any:
        """Takes the item.

        Raises:
            queue.Empty: there is none.
        """
        self._file.seek(0)
        packed = self._file.read()
        self._file.truncate(0)
        self._file.seek(0)
        if not packed:
            raise queue.Empty
        return pickle.loads(packed)  # noqa: S301, from a process that was forked

    def close(self) -> None:
        """Frees its memory."""
        self._file.close()
