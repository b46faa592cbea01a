# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Processes that srun, torchrun or a user starts meet where their launcher says, and are counted."""

import os

import pytest
import torch
from omegaconf import OmegaConf

from nemo_ee.errors import ConfigError
from nemo_ee.runtime.port import free_port

LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "MASTER_", "NODE_", "LOCAL_", "GROUP_", "WORLD_", "RANK")
"""What variables of launchers begin with."""

SLURM = dict(
    SLURM_JOB_NAME="train",
    SLURM_NTASKS="2",
    SLURM_NTASKS_PER_NODE="2",
    SLURM_NNODES="1",
    SLURM_NODELIST="127.0.0.1",
    SLURM_NODEID="0",
)


def build(devices: int = 1, **trainer):
    from nemo_ee.models.runs.trainer_builder import EarlyExitTrainerBuilder

    settings = dict(devices=devices, precision=32, logger=False, enable_checkpointing=False, **trainer)
    cfg = OmegaConf.create(dict(model=dict(mcore_gpt=True), trainer=settings))
    return EarlyExitTrainerBuilder(cfg).create_trainer()


def start_as(variables: dict[str, str], of_rank: dict[str, str]) -> tuple:
    """Builds the trainer in processes that know no more than these variables; `of_rank` hold the rank."""
    from nemo_ee.checkpoint.connector import start_distributed

    rank = torch.distributed.get_rank()
    torch.distributed.destroy_process_group()
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            del os.environ[name]
    os.environ.update(variables, **{name: str(rank) for name in of_rank})
    trainer = build(devices=2)
    start_distributed(trainer)
    total = torch.tensor([rank + 1.0])
    torch.distributed.all_reduce(total)
    return total.item(), int(os.environ["MASTER_PORT"]), type(trainer.strategy.cluster_environment).__name__


def job_and_port() -> tuple[str, int]:
    """A job of SLURM's whose port, 15000 + its last four digits, is free."""
    while (port := free_port()) >= 25000:
        pass
    return f"7{port - 15000:04d}", port


IDS = ("SLURM_PROCID", "SLURM_LOCALID")


def test_tasks_of_srun_meet_at_the_port_of_their_job(workers):
    job, port = job_and_port()
    found = workers(2).run(start_as, {**SLURM, "SLURM_JOB_ID": job}, IDS, timeout=60)
    assert found == [(3.0, port, "SLURMEnvironment")] * 2


def test_a_port_that_the_user_gives_stays(workers):
    job, port = job_and_port()[0], free_port()
    variables = {**SLURM, "SLURM_JOB_ID": job, "MASTER_PORT": str(port)}
    assert workers(2).run(start_as, variables, IDS, timeout=60) == [(3.0, port, "SLURMEnvironment")] * 2


def test_processes_of_torchrun_meet_at_its_port_also_within_a_job(workers):
    port = free_port()
    variables = dict(
        SLURM,
        SLURM_NTASKS="1",  # one torchrun a node
        TORCHELASTIC_RUN_ID="x",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        GROUP_RANK="0",
        SLURM_PROCID="0",
        SLURM_LOCALID="0",
    )
    found = workers(2).run(start_as, variables, ("RANK", "LOCAL_RANK"), timeout=60)
    assert found == [(3.0, port, "TorchElasticEnvironment")] * 2


@pytest.fixture
def no_launcher(monkeypatch):
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_PORT", "")  # so that it is taken back
    monkeypatch.delenv("MASTER_PORT")
    return monkeypatch


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_within_an_interactive_job_this_process_starts_the_others(name, no_launcher):
    for key, value in {**SLURM, "SLURM_JOB_NAME": name, "SLURM_JOB_ID": "12345"}.items():
        no_launcher.setenv(key, value)
    build(devices=2)
    assert 20000 <= int(os.environ["MASTER_PORT"]) < 32767


TORCHRUN = dict(
    TORCHELASTIC_RUN_ID="x",
    RANK="0",
    LOCAL_RANK="0",
    WORLD_SIZE="4",
    LOCAL_WORLD_SIZE="4",
    MASTER_ADDR="127.0.0.1",
    MASTER_PORT="29999",
)
RANK_0 = dict(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_JOB_ID="12345")
CONTRADICTIONS = {
    "srun, fewer": (
        {**SLURM, **RANK_0},
        dict(devices=1),
        "trainer.devices=1: with trainer.num_nodes=1 these are not the processes that were started, 2 in all; "
        "use trainer.devices=2 trainer.num_nodes=1",
    ),
    "srun, otherwise arranged": (
        {**SLURM, **RANK_0, "SLURM_NTASKS": "4", "SLURM_NNODES": "2"},
        dict(devices=4),
        "use trainer.devices=2 trainer.num_nodes=2",
    ),
    "sbatch without srun": (
        {**SLURM, **RANK_0, "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"},
        dict(devices=2),
        "start it with srun --ntasks-per-node=2, or unset SLURM_NTASKS",
    ),
    "srun, tasks of nodes not given": (
        {**SLURM, **RANK_0, "SLURM_NTASKS_PER_NODE": None},
        dict(devices=2),
        "SLURM_NTASKS=2: srun was not told how many of these tasks run on each node; use --ntasks-per-node=2",
    ),
    "torchrun": (TORCHRUN, dict(devices=2), "use trainer.devices=4 trainer.num_nodes=1"),
    "two nodes by hand": ({}, dict(devices=1, num_nodes=2), "MASTER_PORT=not set: 2 processes that are"),
    "two processes by hand": (dict(LOCAL_RANK="1"), dict(devices=2), "MASTER_PORT=not set: 2 processes"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_other_processes_than_the_trainer_asks_for_are_an_error(name, no_launcher):
    variables, settings, message = CONTRADICTIONS[name]
    for key, value in variables.items():
        if value is not None:
            no_launcher.setenv(key, value)
    with pytest.raises(ConfigError) as raised:
        build(**settings)
    assert message in str(raised.value)
