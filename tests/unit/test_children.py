# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Processes that write for a rank: a signal to all does not reach them, and they do not outlive it."""

import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import time

import psutil
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: F401, once for all forked processes

from nemo_ee.runtime.children import SECONDS, _Results, writing_checkpoint
from tests.support.script import ROOT

POOL = """
import os, signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from nemo_ee.runtime.children import end_with_parent

if __name__ == "__main__":
    pool = ProcessPoolExecutor(2, get_context("spawn"), initializer=end_with_parent)
    pool.map(abs, range(8))
    list(pool.map(abs, range(8)))
    print(*[process.pid for process in pool._processes.values()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def ended(pids: list[int], seconds: float) -> bool:
    """Whether all of them are gone within so many seconds."""
    until = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def writer(results: _Results, ready: multiprocessing.Event) -> None:
    """As megatron-core's: forks one more, and waits for it."""
    inner = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    inner.start()
    results.put([os.getpid(), inner.pid])
    ready.set()
    inner.join()


def save(pipe: int) -> None:
    """A rank that saves a checkpoint, is told that its job ends, and is then killed."""
    fork = multiprocessing.get_context("fork")
    with writing_checkpoint():
        results, ready = _Results(), fork.Event()
        process = fork.Process(target=writer, args=(results, ready))
        process.start()
        ready.wait(30)
        pids = results.get_nowait()
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
        alive = [pid for pid in pids if psutil.Process(pid).status() != "zombie"]
        os.write(pipe, f"{pids == alive} {pids[0]} {pids[1]}".encode())
    os.kill(os.getpid(), signal.SIGKILL)


def test_writers_hear_no_signal_and_end_with_their_rank():
    reading, writing = os.pipe()
    rank = multiprocessing.get_context("fork").Process(target=save, args=(writing,))
    rank.start()
    rank.join(60)
    outlived_signals, *pids = os.read(reading, 100).decode().split()
    assert outlived_signals == "True" and rank.exitcode == -signal.SIGKILL
    assert ended([int(pid) for pid in pids], 10)


def test_results_of_any_size_come_back_from_a_forked_process():
    results = _Results()
    for item in ({0: ["x" * 10**6]}, OSError(28, "No space left on device")):
        process = multiprocessing.get_context("fork").Process(target=results.put, args=(item,))
        process.start()
        process.join(30)
        assert process.exitcode == 0, "it waits for nobody to read"
        found = results.get_nowait()
        assert found == item or (found.errno == 28 and type(found) is OSError)
    try:
        results.get_nowait()
        raise AssertionError("there is one more")
    except queue.Empty:
        pass
    results.put(lambda: None)  # which does not pickle
    assert isinstance(results.get_nowait(), RuntimeError)


def test_a_pool_ends_with_its_process(tmp_path):
    """Killed, it cannot say goodbye, and its workers keep each other's pipes open."""
    script = tmp_path / "script.py"
    script.write_text(POOL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, env=environment, text=True, timeout=60
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2 and done.returncode == -signal.SIGKILL, done.stderr
    assert ended(pids, SECONDS + 10)
