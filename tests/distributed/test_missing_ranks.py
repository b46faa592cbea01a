# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A rank that is killed or stops answering ends the others, by the time limit, and they say who it was."""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from nemo_ee.errors import RankMissingError
from nemo_ee.runtime.missing_ranks import naming_missing_ranks
from nemo_ee.runtime.port import free_port
from tests.support import distributed

LIMIT = 4.0
"""Seconds that a collective waits."""

OWN_FAULT, MISSED = 7, 1
"""Exit statuses."""


def rank_main(folder: Path, rank: int, world: int, port: int, faulty: bool) -> None:
    """Trains in a manner of speaking: all-reduces until one fails. A faulty rank raises in the tenth."""
    os.setpgid(0, 0)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=LIMIT),
    )
    try:
        with naming_missing_ranks():
            for step in range(100_000):
                (folder / f"step_{rank}").write_text(str(step))
                if faulty and step == 10:
                    raise KeyError("a fault of its own")
                torch.distributed.all_reduce(torch.ones(1))
                time.sleep(0.01)
    except RankMissingError as error:
        (folder / f"said_{rank}").write_text(str(error))
        os._exit(MISSED)
    except KeyError:
        os._exit(OWN_FAULT)
    except RuntimeError as error:
        (folder / f"said_{rank}").write_text(f"unnamed: {error}")
        os._exit(MISSED)
    sys.exit(0)


def ranks(folder: Path, world: int, faulty: int | None = None) -> list:
    """Started, and at work."""
    distributed.start_server()
    port = free_port()
    started = [
        distributed.context.Process(target=rank_main, args=(folder, r, world, port, r == faulty))
        for r in range(world)
    ]
    for process in started:
        process.start()
    deadline = time.monotonic() + distributed.START_SECONDS
    while not all((folder / f"step_{r}").exists() for r in range(world)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return started


@pytest.mark.parametrize(
    ("world", "victim", "number"),
    [
        (3, 1, signal.SIGKILL),
        (3, 0, signal.SIGKILL),
        (2, 1, signal.SIGSTOP),
        pytest.param(3, 0, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_the_missing_rank_is_named(world, victim, number, workers, tmp_path):
    started = ranks(tmp_path, world)
    try:
        os.kill(started[victim].pid, number)
        others = [rank for rank in range(world) if rank != victim]
        begin = time.monotonic()
        for rank in others:
            started[rank].join(60)
            assert started[rank].exitcode == MISSED
        assert time.monotonic() - begin < 45
        for rank in others:
            said = (tmp_path / f"said_{rank}").read_text()
            assert said.startswith(f"rank {victim} (on ") and "distributed_timeout_minutes" in said
            assert not any(f"rank {other} " in said for other in others)
    finally:
        for process in started:
            distributed._kill(process)


def test_a_rank_that_fails_by_itself_is_not_called_missing(workers, tmp_path):
    started = ranks(tmp_path, 2, faulty=1)
    try:
        for process in started:
            process.join(60)
        assert [process.exitcode for process in started] == [MISSED, OWN_FAULT]
        said = (tmp_path / "said_0").read_text()
        assert said.startswith("rank 1 on ") and "has ended with" in said and "a fault of its own" in said
    finally:
        for process in started:
            distributed._kill(process)


def test_one_process_alone_waits_for_nobody():
    with pytest.raises(RuntimeError, match="gloo"), naming_missing_ranks():
        raise RuntimeError("gloo")
