# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Processes that end with the process that started them, however that ends."""

import multiprocessing
import os
import threading
import time

SECONDS = 1.0
"""How long a process may outlive its parent."""


def end_with_parent() -> None:
    """Ends this process when its parent has gone, if multiprocessing started it; otherwise does nothing.

    megatron-core's checkpoint writer starts a manager process, which waits for its rank for ever where that was
    killed and could not say goodbye.
    """
    if multiprocessing.current_process().name == "MainProcess":
        return
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS)
    os._exit(1)
