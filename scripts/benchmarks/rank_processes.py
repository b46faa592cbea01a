# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Runs a function in several fresh processes of this machine that form one torch.distributed group."""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_ee.files.output import replaced_file
from nemo_ee.files.scratch import scratch_folder

TAIL = 4000
"""Characters of a failed rank's traceback that are shown."""


class RankError(RuntimeError):
    """A rank raised, died, or was not done in time."""


def run_ranks(
    function: Callable, world_size: int, *arguments: Any, backend: str = "gloo", timeout: float = 3600.0
) -> list[Any]:
    """Calls `function(*arguments)` in every rank; returns what each returned, in the order of ranks.

    Args:
        function: at the top level of a module or script; may import NeMo and Megatron.
        world_size: number of processes.
        *arguments: picklable.
        backend: `gloo`, or `nccl` with one GPU per rank.
        timeout: seconds for all of it, imports included.

    Raises:
        RankError: see the message.
    """
    context = multiprocessing.get_context("spawn")
    with scratch_folder("ranks") as folder:
        ranks = [
            context.Process(target=_main, args=(folder, rank, world_size, backend, function, arguments))
            for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            _wait(ranks, time.monotonic() + timeout, timeout)
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()
        found = [Path(folder) / f"result_{rank}" for rank in range(world_size)]
        if not all(path.exists() for path in found):
            errors = [path.read_text()[-TAIL:] for path in sorted(Path(folder).glob("error_*"))]
            codes = [process.exitcode for process in ranks]
            raise RankError("\n".join([f"ranks ended with exit codes {codes}", *errors]))
        return [pickle.loads(path.read_bytes()) for path in found]


def _wait(ranks: list, deadline: float, timeout: float) -> None:
    """Waits until all have ended or one has failed."""
    while any(process.exitcode is None for process in ranks):
        if any(process.exitcode not in (None, 0) for process in ranks):
            time.sleep(2.0)  # others that fail write why
            return
        if time.monotonic() > deadline:
            raise RankError(f"not done after {timeout:.0f} s")
        multiprocessing.connection.wait([p.sentinel for p in ranks if p.exitcode is None], 0.5)


def _main(
    folder: Path, rank: int, world_size: int, backend: str, function: Callable, arguments: tuple
) -> None:
    from nemo_ee.runtime import stand_ins

    threading.Thread(target=_die_with_parent, daemon=True).start()
    warnings.filterwarnings("ignore", "Apex is not installed")
    try:
        stand_ins.enable()
        import torch

        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        if backend == "nccl":
            torch.cuda.set_device(rank)
        store = f"file://{folder}/store"
        torch.distributed.init_process_group(backend, init_method=store, rank=rank, world_size=world_size)
        result = function(*arguments)
        torch.distributed.barrier()  # who leaves early breaks the connections of those still at work
        with replaced_file(folder / f"result_{rank}") as part:
            part.write_bytes(pickle.dumps(result))
    except BaseException:
        (folder / f"error_{rank}").write_text(f"--- rank {rank} ---\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)  # torch.distributed's threads have nothing left to do


def _die_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
