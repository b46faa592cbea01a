# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The launcher that distributed tests stand on: results, isolation, and failures that say what happened."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch

from tests.support.distributed import WorkerError, initialize_model_parallel


def sum_of_ranks(offset):
    total = torch.tensor([torch.distributed.get_rank() + offset])
    torch.distributed.all_reduce(total)
    return total


def parallel_ranks(tp, pp):
    from megatron.core import parallel_state

    initialize_model_parallel(tp=tp, pp=pp)
    return (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )


def one_rank_raises():
    if torch.distributed.get_rank() == 1:
        raise ValueError("rank 1 has had enough")
    torch.distributed.barrier()


def one_rank_dies():
    if torch.distributed.get_rank() == 0:
        print("last words", flush=True)
        os._exit(7)
    torch.distributed.barrier()


def one_rank_hangs():
    if torch.distributed.get_rank() == 0:
        time.sleep(1000)


def test_results_come_back_in_rank_order(workers):
    assert [total.item() for total in workers(2).run(sum_of_ranks, offset=10)] == [21, 21]


@pytest.mark.parametrize("tp, pp", [(2, 2), (4, 1), (1, 2)])
def test_every_job_has_its_own_parallel_state(workers, tp, pp):
    dp = 4 // (tp * pp)
    expected = [
        (stage, replica, shard) for stage in range(pp) for replica in range(dp) for shard in range(tp)
    ]
    assert workers(4).run(parallel_ranks, tp, pp) == expected


def named_semaphore():
    kept.append(multiprocessing.Lock())
    return kept[0]._semlock.name


kept = []


def test_ranks_leave_no_semaphores(workers):
    """Which the kernel would keep, and Python's tracker complain about when all tests have run."""
    for name in workers(2).run(named_semaphore):
        assert name.startswith("/") and not Path(f"/dev/shm/sem.{name[1:]}").exists()


def test_an_exception_is_reported_with_its_traceback(workers):
    with pytest.raises(
        WorkerError, match="(?s)rank 1 failed.*rank 1 .exit code 1.*ValueError: rank 1 has had enough"
    ):
        workers(2).run(one_rank_raises)


def test_a_death_is_reported_with_the_last_output(workers):
    with pytest.raises(WorkerError, match="(?s)rank 0 .exit code 7.*last words"):
        workers(2).run(one_rank_dies)


def test_a_hang_ends_with_the_place_where_it_hung(workers):
    start = time.monotonic()
    with pytest.raises(WorkerError, match="(?s)no result after 5 s.*in one_rank_hangs"):
        workers(2).run(one_rank_hangs, timeout=5.0)
    assert time.monotonic() - start < 60
