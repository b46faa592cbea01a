# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Processes that write for a rank: a signal to all does not reach them, and they do not outlive it."""

import multiprocessing
import os
import signal
import subprocess
import sys

import psutil

from nemo_ee.runtime.children import SECONDS, children_outlive_signals
from tests.support.script import ROOT

PARENT = """
import multiprocessing, sys, time
import nemo_ee.runtime.script
if __name__ == "__main__":
    manager = multiprocessing.get_context("spawn").Manager()
    print(manager._process.pid, flush=True)
    time.sleep(60)
"""


def test_processes_started_within_never_hear_it():
    with children_outlive_signals():
        manager = multiprocessing.get_context("spawn").Manager()
        queue, pid = manager.Queue(), manager._process.pid
    os.kill(pid, signal.SIGTERM)
    queue.put("still here")
    assert queue.get() == "still here"
    manager.shutdown()


def test_a_writer_ends_with_its_rank(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, env=environment, text=True
    )
    writer = psutil.Process(int(parent.stdout.readline()))
    os.kill(writer.pid, signal.SIGTERM)
    assert writer.is_running() and parent.poll() is None
    parent.kill()
    writer.wait(SECONDS + 20)
