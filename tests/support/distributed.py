# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Run a function in several processes that talk over gloo, as ``torchrun`` would, and pay for imports once.

In a test, use the ``workers`` fixture::

    def ranks_sum(offset):                      # top level of the test module; runs in every rank
        total = torch.tensor([torch.distributed.get_rank() + offset])
        torch.distributed.all_reduce(total)
        return total.item()

    def test_sum(workers):
        assert workers(4).run(ranks_sum, 10) == [46, 46, 46, 46]

How it works. Importing NeMo takes 12 seconds and more. One server process (Python's ``forkserver``) imports
it once per pytest session, in the background, and never computes anything. Every call of `run_distributed`
forks fresh ranks from it, which takes some tenths of a second. So jobs share nothing: no state of
torch.distributed, Megatron or NeMo is left over from the job before, and a rank that crashes or hangs is
killed with its job alone.

In every rank, before the function is called:

- torch.distributed is initialised with gloo; Megatron's parallel state is not: `initialize_model_parallel`;
- RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and the rest of torchrun's variables are set, so that
  ``Trainer(devices=world_size)`` joins the same ranks;
- torch uses one thread, and random, numpy and torch are seeded with 0;
- the working directory is a temporary one of the job's own, the same for all ranks.
"""

import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ee.runtime.port import free_port

GRACE_SECONDS = 2.0
"""How long the other ranks may go on after the first one failed, so that their tracebacks are seen too."""

DUMP_SECONDS = 2.0
"""How long ranks that did not finish in time have to print where they are."""

START_SECONDS = 600.0
"""How long ranks may take until they call the function: the server imports NeMo first."""

DEFAULT_TIMEOUT = float(os.environ.get("NEMO_EE_TEST_TIMEOUT", 600))
"""Seconds a job may take unless its test says otherwise."""

LOG_TAIL_CHARACTERS = 4000

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.support.preload"])


class WorkerError(RuntimeError):
    """A rank raised, died or did not finish in time; the message holds its traceback and last output."""


@dataclass(frozen=True)
class Workers:
    """`world_size` processes to run functions in; what the ``workers(world_size)`` fixture returns."""

    world_size: int

    def run(self, fn: Callable, *args: Any, timeout: float = DEFAULT_TIMEOUT, **kwargs: Any) -> list[Any]:
        """See `run_distributed`."""
        return run_distributed(fn, self.world_size, *args, timeout=timeout, **kwargs)


def start_server() -> None:
    """Starts the server process, which begins its imports in the background. Later calls do nothing."""
    multiprocessing.forkserver.ensure_running()


def run_distributed(
    fn: Callable, world_size: int, *args: Any, timeout: float = DEFAULT_TIMEOUT, **kwargs: Any
) -> list[Any]:
    """Calls ``fn(*args, **kwargs)`` in `world_size` fresh processes that form one gloo group.

    Args:
        fn: a function at the top level of an importable module (it travels by name, not by value).
        world_size: number of processes, 1 or more.
        *args: picklable; tensors are copied.
        timeout: seconds until the job is killed, from the moment the last rank calls `fn`.
        **kwargs: as args.

    Returns:
        What each rank returned, in the order of ranks. Anything picklable; tensors come back as they were.

    Raises:
        WorkerError: a rank raised, died or did not finish in time.
    """
    start_server()
    with tempfile.TemporaryDirectory(prefix="nemo_ee_workers_") as folder:
        job = _Job(Path(folder), world_size, free_port())
        (job.folder / "call").write_bytes(pickle.dumps((fn, args, kwargs)))
        (job.folder / "work").mkdir()
        processes = [context.Process(target=_rank_main, args=(job, rank)) for rank in range(world_size)]
        try:
            for process in processes:
                process.start()
            failure = _wait(job, processes, timeout)
        finally:
            for process in processes:
                _kill(process)
        if failure is not None or any(not job.result(rank).exists() for rank in range(world_size)):
            raise WorkerError(job.report(fn, failure, [process.exitcode for process in processes]))
        return [pickle.loads(job.result(rank).read_bytes()) for rank in range(world_size)]


def initialize_model_parallel(tp: int = 1, pp: int = 1, seed: int = 1234, **kwargs: Any) -> None:
    """Initialises Megatron's parallel state and its RNG tracker in this rank, for tests of code below NeMo.

    Tests that build a NeMo model do not need it: NeMo does the same from the model's configuration.
    Collective over all ranks.

    Args:
        tp: tensor parallel size.
        pp: pipeline parallel size. The data parallel size is what is left of the world.
        seed: of the RNG tracker; each pipeline stage gets ``seed + 100 * stage``, as in NeMo.
        **kwargs: for ``megatron.core.parallel_state.initialize_model_parallel``.
    """
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **kwargs
    )
    tensor_parallel.model_parallel_cuda_manual_seed(
        seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    )


@dataclass(frozen=True)
class _Job:
    """What parent and ranks know of one call; everything else passes through files in `folder`."""

    folder: Path
    world_size: int
    port: int

    def result(self, rank: int) -> Path:
        return self.folder / f"result_{rank}"

    def error(self, rank: int) -> Path:
        return self.folder / f"error_{rank}"

    def ready(self, rank: int) -> Path:
        return self.folder / f"ready_{rank}"

    def log(self, rank: int) -> Path:
        return self.folder / f"log_{rank}"

    def report(self, fn: Callable, failure: str | None, exit_codes: list[int | None]) -> str:
        """The message of a WorkerError: the ranks that raised, first one first, then those that vanished."""
        lines = [
            f"{fn.__qualname__} failed on {self.world_size} ranks: {failure or 'a rank returned no result'}"
        ]
        raised = [rank for rank in range(self.world_size) if self.error(rank).exists()]
        raised.sort(key=lambda rank: self.error(rank).stat().st_mtime_ns)
        others = [
            rank for rank in range(self.world_size) if rank not in raised and not self.result(rank).exists()
        ]
        for rank in raised + others:
            lines.append(f"--- rank {rank} (exit code {exit_codes[rank]}) ---")
            if self.error(rank).exists():
                lines.append(self.error(rank).read_text())
            log = self.log(rank).read_text(errors="replace") if self.log(rank).exists() else ""
            if log.strip():
                lines.append(f"last output of rank {rank}:\n{log[-LOG_TAIL_CHARACTERS:]}")
        return "\n".join(lines)


def _wait(job: _Job, processes: list, timeout: float) -> str | None:
    """Waits until every rank has ended; returns why it stopped waiting if that is a failure."""
    deadline, ready, limit = time.monotonic() + START_SECONDS, False, START_SECONDS
    while True:
        running = [process.sentinel for process in processes if process.exitcode is None]
        failed = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
        if failed:
            multiprocessing.connection.wait(running, GRACE_SECONDS)
            return f"rank {failed[0]} failed"
        if not running:
            return None
        if not ready and all(job.ready(rank).exists() for rank in range(job.world_size)):
            deadline, ready, limit = time.monotonic() + timeout, True, timeout
        if time.monotonic() > deadline:
            for process in processes:
                if process.exitcode is None:
                    os.kill(process.pid, signal.SIGUSR1)  # each prints where it hangs, into its log
            time.sleep(DUMP_SECONDS)
            what = "no result" if ready else "not started"
            return f"{what} after {limit:.0f} s; where each rank was is in its output below"
        multiprocessing.connection.wait(running, 0.2)


def _kill(process) -> None:
    """Ends a rank and whatever it started: data loaders, checkpoint writers."""
    if process.pid is None:
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # all gone already, or it has not made its own group yet
        if process.exitcode is None:
            process.kill()
    process.join()


def _rank_main(job: _Job, rank: int) -> None:
    """The life of one rank."""
    import faulthandler

    os.setpgid(0, 0)
    log = os.open(job.log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        result = _call(job, rank)
        temporary = job.folder / f"writing_{rank}"
        temporary.write_bytes(pickle.dumps(result))
        temporary.rename(job.result(rank))
    except BaseException:
        job.error(rank).write_text(traceback.format_exc())
        sys.stderr.flush()
        os._exit(1)
    # multiprocessing now gives back what this rank had of it (semaphores, folders), and ends without exit handlers


def _die_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os.killpg(0, signal.SIGKILL)


def _call(job: _Job, rank: int) -> Any:
    """Sets one rank up and calls the function."""
    import numpy
    import torch

    import tests.support.preload  # noqa: F401  (done by the server, which hides an import that failed)

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(job.world_size),
        LOCAL_WORLD_SIZE=str(job.world_size),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(job.port),
        TORCHELASTIC_RUN_ID="nemo_ee_tests",
        OMP_NUM_THREADS="1",
    )
    os.chdir(job.folder / "work")
    torch.set_num_threads(1)
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    fn, args, kwargs = pickle.loads((job.folder / "call").read_bytes())
    if gpu := torch.cuda.is_available():
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl" if gpu else "gloo",
        init_method=f"file://{job.folder}/store",
        rank=rank,
        world_size=job.world_size,
    )
    job.ready(rank).touch()
    result = fn(*args, **kwargs)
    torch.distributed.barrier()  # a rank that leaves early would break the connections of those still at work
    return result
