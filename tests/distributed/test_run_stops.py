# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Runs that end early, killed, asked to, or out of time: they go on as if they had not, validation or none."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.distributed import WorkerError
from tests.support.tuning import Case, Layout, prepared, tuning_trainer, write_text

STEPS, AT = 7, 3
"""Steps of a run, and the step in which it is ended."""

HEAD = dict(mlp=True, linear=True, projection="shortlist", shortlist_size=90)
TUNED = Case(dict(layers=[2, 8], head=HEAD, init="random"))


def settings(folder: Path, every: int | None, nemo: bool = False, **more) -> dict:
    return dict(
        explicit_log_dir=str(folder),
        create_tensorboard_logger=False,
        resume_if_exists=True,
        resume_ignore_no_checkpoint=True,
        use_datetime_version=False,
        log_tflops_per_sec_per_gpu=False,
        seconds_to_sleep=0.0,
        checkpoint_callback_params=dict(
            monitor="val_loss",
            mode="min",
            save_top_k=1,
            save_last=True,
            save_nemo_on_train_end=nemo,
            every_n_train_steps=every,
            filename="run--{val_loss:.3f}-{step}-{consumed_samples}",
        ),
        **more,
    )


def run(
    pretraining: bool,
    prefixes: dict,
    layout: Layout,
    experiment: dict,
    ending: str | None,
    validations: int = 0,
    interval: int = STEPS,
) -> dict:
    """One start of a training script, as far as it gets.

    Args:
        pretraining: or tuning.
        prefixes: of the data.
        layout: of the ranks.
        experiment: the `exp_manager` section.
        ending: `kill` or the name of a signal, which the last rank gets in step `AT`; `slow`: every step takes
            0.3 s; None: nothing.
        validations: batches of each.
        interval: steps between them.
    """
    from lightning.pytorch.callbacks import Callback
    from omegaconf import OmegaConf

    from nemo_ee.models.runs.experiment import fit, start_experiment

    class End(Callback):
        def on_train_batch_start(self, trainer, *_):
            if ending == "slow":
                time.sleep(0.3)
            elif ending is not None and trainer.global_step + 1 == AT:
                if trainer.global_rank == trainer.world_size - 1:
                    os.kill(os.getpid(), getattr(signal, ending))

    trainer = tuning_trainer(
        layout, STEPS, val_check_interval=interval, limit_val_batches=validations, callbacks=[End()]
    )
    start_experiment(trainer, OmegaConf.create(experiment))
    model = model_to_fit(pretraining, "tied", prefixes, layout, trainer)
    fit(trainer, model)
    return dict(
        losses=model.seen_losses if pretraining else model.seen[True],
        validations=None if pretraining else model.seen[False],
        final={name: value.clone() for name, value in model.gpt.named_parameters()},
        logged=trainer.fit_loop.epoch_loop._batches_that_stepped,
    )


def model_to_fit(pretraining: bool, projection: str, prefixes: dict, layout: Layout, trainer) -> Any:
    """Its weights set by name; `projection` is that of pre-training's exits."""
    if not pretraining:
        return prepared(prefixes, TUNED, layout, trainer, torch.float32)
    from tests.support import pretraining as support
    from tests.support.tiny_gpt import fill

    case = support.Case(dict(layers=[2, 6], head=dict(norm=True, projection=projection), init="random"))
    model = support.Recorder()(support.pretraining_config(prefixes, case, layout), trainer)
    fill(model)
    model.first_weights.complete = True
    return model


def last_step(folder: Path) -> int:
    (path,) = folder.glob("checkpoints/*-last")
    assert not Path(f"{path}-unfinished").exists()
    return int(path.name.partition("-step=")[2].partition("-")[0])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def compare(resumed: list[dict], whole: list[dict], done: int) -> None:
    for mine, other in zip(resumed, whole, strict=True):
        assert len(other["losses"]) == STEPS and mine["losses"] == other["losses"][done:]
        assert mine["logged"] == other["logged"] == STEPS, "loggers count steps on"
        for name, value in other["final"].items():
            assert mine["final"][name].equal(value), name


ENDINGS = {
    "tuning, PP2, SIGTERM": (False, Layout(pp=2), "SIGTERM", None, AT),
    "tuning, SIGUSR1, by step": (False, Layout(), "SIGUSR1", AT, AT),
    "pre-training, SIGTERM": (True, Layout(), "SIGTERM", None, AT),
    "pre-training, PP2, out of time": (True, Layout(pp=2), "slow", None, None),
    "tuning, killed": (False, Layout(), "SIGKILL", 2, 2),
    "pre-training, PP2, killed": (True, Layout(pp=2), "SIGKILL", 2, 2),
}


DEFAULT = {"tuning, SIGUSR1, by step", "pre-training, PP2, out of time"}


@pytest.mark.parametrize(
    "name", [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in ENDINGS]
)
def test_without_validation_a_run_ends_and_goes_on(name, text, workers, tmp_path):
    pretraining, layout, ending, every, done = ENDINGS[name]
    text, pool = {**text, "validation": None}, workers(layout.world_size)
    limit = dict(max_time_per_run="00:00:00:01") if ending == "slow" else {}

    def start(folder: str, ending: str | None, **limit) -> list[dict]:
        chosen = settings(tmp_path / folder, every, pretraining, **limit)
        return pool.run(run, pretraining, text, layout, chosen, ending)

    def is_complete(folder: str) -> bool:
        files = list(tmp_path.glob(f"{folder}/checkpoints/*.nemo"))
        return last_step(tmp_path / folder) == STEPS and len(files) == pretraining

    whole = start("whole", None)
    assert is_complete("whole")
    if ending == "SIGKILL":
        with pytest.raises(WorkerError, match="exit code -9"):
            start("run", ending)
    else:
        start("run", ending, **limit)  # returns as a finished run does
    assert not list(tmp_path.glob("run/checkpoints/*.nemo"))
    reached = last_step(tmp_path / "run")
    assert reached == done if done else 0 < reached < STEPS
    compare(start("run", None), whole, reached)
    assert is_complete("run")


def test_steps_and_validations_each_write_checkpoints(text, workers, tmp_path):
    """Validations at 3 and 6, checkpoints by step at 2, 4 and 6; killed in step 3, it goes on behind step 2:
    the first step is validated."""
    layout, every, interval = Layout(), 2, 3
    more = dict(validations=2, interval=interval)
    (whole,) = workers(1).run(run, False, text, layout, settings(tmp_path / "whole", every), None, **more)
    assert len(whole["validations"]) == 2 * (2 + 1)  # each has two batches and their means
    assert last_step(tmp_path / "whole") == STEPS
    best = [
        path for path in tmp_path.glob("whole/checkpoints/*") if path.is_dir() and "-last" not in path.name
    ]
    assert len(best) == 1, "of the validations, whatever was written by step in between"
    with pytest.raises(WorkerError, match="exit code -9"):
        workers(1).run(run, False, text, layout, settings(tmp_path / "run", every), "SIGKILL", **more)
    assert last_step(tmp_path / "run") == 2
    (resumed,) = workers(1).run(run, False, text, layout, settings(tmp_path / "run", every), None, **more)
    compare([resumed], [whole], 2)
    assert resumed["validations"] == whole["validations"]
