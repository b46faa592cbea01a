# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Whether the processes that a launcher started are those that the trainer asks for, and where they meet."""

import os

from lightning.fabric.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch import Trainer

from nemo_ee.errors import ConfigError, Fault
from nemo_ee.runtime.port import choose_master_port


def slurm_environment() -> SLURMEnvironment | None:
    """Lightning's environment of processes that srun started; None where they were started otherwise.

    Without Lightning's own re-queueing: upon SIGUSR1 that saves a checkpoint at once, in the middle of a step
    and on every rank in another place. See `nemo_ee.models.runs.run_checkpoint.StopOnSignal`.

    Raises:
        ConfigError: srun was not told how many tasks a node has, which Lightning asks for.
    """
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return None
    try:
        return SLURMEnvironment(auto_requeue=False)
    except RuntimeError:
        tasks = int(os.environ["SLURM_NTASKS"])
        nodes = int(os.environ.get("SLURM_JOB_NUM_NODES") or os.environ.get("SLURM_NNODES") or 1)
        rule = "srun was not told how many of these tasks run on each node"
        remedy = f"use --ntasks-per-node={-(-tasks // nodes)} in place of --ntasks={tasks}"
        raise ConfigError(Fault("SLURM_NTASKS", tasks, rule, remedy)) from None


def check_launch(trainer: Trainer) -> None:
    """Checks who else takes part; chooses MASTER_PORT where nobody but this process could.

    Under srun, torchrun, LSF or MPI every process finds the same port in its environment or derives it from
    the job, as Lightning's environment of that launcher does.

    Raises:
        ConfigError: the launcher started other processes than the trainer asks for, or processes started by
            hand were not told where to meet.
    """
    environment = trainer.strategy.cluster_environment
    devices, nodes = trainer.num_devices, trainer.num_nodes
    started, each = environment.world_size(), _tasks_per_node(environment)
    if started != devices * nodes or each not in (None, devices):
        rule = (
            f"with trainer.num_nodes={nodes} these are not the processes that were started, {started} in all"
        )
        raise ConfigError(
            Fault("trainer.devices", devices, rule, _remedy(environment, devices, started, each))
        )
    by_hand = isinstance(environment, LightningEnvironment)
    if started == 1 or (by_hand and nodes == 1 and not environment.creates_processes_externally):
        choose_master_port()
    elif by_hand and "MASTER_PORT" not in os.environ:
        rule = f"{started} processes that are started by hand must be told where to meet"
        remedy = (
            "set MASTER_PORT, MASTER_ADDR and on each node NODE_RANK, or start them with torchrun or srun"
        )
        raise ConfigError(Fault("MASTER_PORT", "not set", rule, remedy))


def _tasks_per_node(environment: object) -> int | None:
    """Processes that the launcher started on a node, where it says so."""
    if isinstance(environment, TorchElasticEnvironment):
        given = os.environ.get("LOCAL_WORLD_SIZE")
    elif isinstance(environment, SLURMEnvironment):
        given = os.environ.get("SLURM_NTASKS_PER_NODE")
    else:
        given = None
    return None if given is None else int(given)


def _remedy(environment: object, devices: int, started: int, each: int | None) -> str:
    if isinstance(environment, SLURMEnvironment) and started == 1:
        return f"start it with srun --ntasks-per-node={devices}, or unset SLURM_NTASKS"
    if each is not None and started % each == 0:
        return f"use trainer.devices={each} trainer.num_nodes={started // each}"
    return f"use numbers whose product is {started}, or start others"
