# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Ranks with pretend GPUs that have NeMo imported: what `tests.support.distributed` is, in a process that has them.

In a test, use the ``pretend_gpus`` fixture: ``pretend_gpus(2).run(fn, …)`` calls fn in two ranks, each with a GPU of
its own. What fn returns must be the host's, as of a rank with a real GPU. One job runs at a time.
"""

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.support import distributed
from tests.support.pretend_gpu import ROOT, environment

GPUS = 4
"""What `torch.cuda.device_count()` says."""


@dataclass(frozen=True)
class PretendGpus:
    """As many ranks; what the ``pretend_gpus(n)`` fixture returns."""

    world_size: int

    def run(
        self, fn: Callable, *args: Any, timeout: float = distributed.DEFAULT_TIMEOUT, **kwargs: Any
    ) -> list[Any]:
        """See `tests.support.distributed.run_distributed`."""
        call = pickle.dumps((fn, args, kwargs))
        with _lock:
            server = start_server()
            assert server.stdin is not None and server.stdout is not None
            pickle.dump((call, self.world_size, timeout), server.stdin)
            server.stdin.flush()
            results, error = pickle.load(server.stdout)
        if error is not None:
            raise distributed.WorkerError(error)
        return results


_lock = threading.Lock()
_server: subprocess.Popen | None = None


def start_server() -> subprocess.Popen:
    """Starts the process that keeps ranks at hand; it begins its imports in the background."""
    global _server
    if _server is None or _server.poll() is not None:
        command = [sys.executable, "-m", __name__]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        _server = subprocess.Popen(command, env=environment(GPUS), cwd=ROOT, **pipes)
    return _server


def stop_server() -> None:
    """Ends it and what it keeps."""
    if _server is None:
        return
    assert _server.stdin is not None
    _server.stdin.close()
    try:
        _server.wait(10)
    except subprocess.TimeoutExpired:
        _server.kill()
        _server.wait()


def on_a_gpu(fn: Callable, *args: Any, **kwargs: Any) -> Any:
    """Calls it in a rank that has a pretend GPU: without one it would agree with the CPU, and show nothing."""
    import torch

    from tests.support.pretend_gpu.tensor import CudaTensor

    assert torch.cuda.is_available() and isinstance(torch.empty(0, device="cuda"), CudaTensor), (
        "no pretend GPU"
    )
    assert torch.distributed.get_backend() == "nccl"
    return fn(*args, **kwargs)


def _serve() -> None:
    """Answers requests until there are none."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed here is no answer
    distributed.start_server()
    while True:
        try:
            call, world_size, timeout = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            fn, args, kwargs = pickle.loads(call)
            results = distributed.run_distributed(on_a_gpu, world_size, fn, *args, timeout=timeout, **kwargs)
            encoded = pickle.dumps((results, None))
        except Exception as error:
            encoded = pickle.dumps((None, str(error)))
        answers.write(encoded)
        answers.flush()


if __name__ == "__main__":
    from tests.support.pretend_gpu import pool  # so that classes travel by their real names

    pool._serve()
