# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that are spoilt, losses that are no numbers, a full disk: one error, and what was good stays."""

import multiprocessing.resource_tracker
import resource
import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed.test_run_stops import STEPS, last_step, model_to_fit, settings
from tests.support import hostile_weights
from tests.support.tuning import Layout, tuning_trainer, write_text

AT = 5
"""The step in which something happens; a checkpoint is written every second step."""


def attempt(
    pretraining: bool, prefixes: dict, layout: Layout, experiment: dict, event: str | None = None
) -> dict:
    """One start of a training script, as far as it gets.

    Args:
        pretraining: or tuning.
        prefixes: of the data.
        layout: of the ranks.
        experiment: the `exp_manager` section.
        event: in step `AT`: `nan`, a weight of the last rank's last exit becomes NaN before it; `nan after`, behind
            it; `full N`, no file may be larger than N bytes from then on.

    Returns:
        The error, its kind, the losses, and the processes that are left.
    """
    import psutil
    from lightning.pytorch.callbacks import Callback
    from omegaconf import OmegaConf

    from nemo_ee import errors
    from nemo_ee.models.runs.experiment import experiment as running
    from nemo_ee.models.runs.experiment import fit

    def spoil(trainer) -> None:
        if trainer.global_rank == trainer.world_size - 1:
            *_, exit_ = model.gpt.exits.values()
            with torch.no_grad():
                next(p for p in exit_.parameters() if p.requires_grad).view(-1)[0] = float("nan")

    class Event(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step + 1 != AT or event is None:
                return
            if event == "nan":
                spoil(trainer)
            if event.startswith("full"):
                most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(event.split()[1]), most))

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == AT + 1 and event == "nan after":
                spoil(trainer)

    trainer = tuning_trainer(
        layout, STEPS, val_check_interval=STEPS, limit_val_batches=0, callbacks=[Event()]
    )
    model, outcome = None, {}
    try:
        with running(trainer, OmegaConf.create(experiment)):
            model = model_to_fit(pretraining, "untied", prefixes, layout, trainer)
            fit(trainer, model)
    except (errors.CheckpointError, errors.ConfigError, errors.OutputError, errors.TrainingError) as error:
        outcome = dict(kind=type(error).__name__, error=str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    losses = [] if model is None else model.seen_losses if pretraining else model.seen[True]
    left = [process.cmdline() for process in psutil.Process().children(recursive=True)]
    tracker = multiprocessing.resource_tracker._resource_tracker._pid
    return dict(outcome, steps=len(losses), left=left, tracker=tracker)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return {**write_text(tmp_path_factory.mktemp("text")), "validation": None}


@pytest.fixture(scope="module")
def killed(text, workers, tmp_path_factory) -> Path:
    """A run of tuning that stopped at step 5, with a last checkpoint of step 4."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    (found,) = workers(1).run(attempt, False, text, Layout(), settings(folder, 2), "nan")
    assert found["kind"] == "TrainingError" and found["error"].startswith(
        f"step {AT}: the loss of exit 8 is nan"
    )
    assert last_step(folder) == 4
    assert not found["left"] and found["tracker"] is None, "writing checkpoints leaves no process"
    return folder


RUNS = {
    "tuning, PP2": (False, Layout(pp=2), "nan", "the loss of exit 8 is nan"),
    "pre-training, PP2": (True, Layout(pp=2), "nan", "the loss of exit 6 is nan"),
    "pre-training": (True, Layout(), "nan after", "1 weights have become NaN"),
}


@pytest.mark.parametrize("name", RUNS)
def test_it_stops_at_a_loss_that_is_no_number(name, text, workers, tmp_path):
    pretraining, layout, event, words = RUNS[name]
    pool, experiment = workers(layout.world_size), settings(tmp_path / "run", 2)
    for rank in pool.run(attempt, pretraining, text, layout, experiment, event):
        assert rank["kind"] == "TrainingError" and words in rank["error"]
        assert not rank["left"] and rank["tracker"] is None
    assert last_step(tmp_path / "run") == 4
    for rank in pool.run(attempt, pretraining, text, layout, experiment):
        assert "error" not in rank and rank["steps"] == STEPS - 4, "it goes on from before"


@pytest.mark.parametrize("most", [2_000, 20_000])
def test_a_full_disk_is_an_error_and_the_checkpoint_before_stays(most, text, workers, tmp_path):
    experiment = settings(tmp_path / "run", 2)
    (rank,) = workers(1).run(attempt, False, text, Layout(), experiment, f"full {most}")
    assert rank["kind"] == "OutputError", rank
    assert (
        "step=6" in rank["error"]
        and "cannot be written" in rank["error"]
        and "then the same command" in rank["error"]
    )
    assert last_step(tmp_path / "run") == 4
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if "step=6" in path.name] == []
    (again,) = workers(1).run(attempt, False, text, Layout(), experiment)
    assert "error" not in again and again["steps"] == STEPS - 4


HOSTILE = (
    "metadata runs code",
    "common state runs code",
    "nothing is left",
    "a data file is cut",
    "common state is a list",
)


def test_a_spoilt_last_checkpoint_is_named_and_not_unpickled(killed, text, workers, tmp_path):
    for number, name in enumerate(HOSTILE):
        run = tmp_path / str(number) / "run"
        shutil.copytree(killed, run)
        (last,) = run.glob("checkpoints/*-last")
        spoil, words = hostile_weights.FOLDERS[name]
        spoil(last)
        (rank,) = workers(1).run(attempt, False, text, Layout(), settings(run, 2))
        assert rank["kind"] == "CheckpointError" and words in rank["error"], rank
        assert str(last) in rank["error"] and f"delete {last} to begin anew" in rank["error"]
        assert not list(tmp_path.rglob("ran")) and last.exists()


def test_it_falls_back_to_the_checkpoint_before(killed, text, workers, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    (last,) = run.glob("checkpoints/*-last")
    before = last.with_name(last.name.removesuffix("-last").replace("step=4", "step=3"))
    shutil.copytree(last, before)
    hostile_weights.FOLDERS["metadata runs code"][0](last)
    (rank,) = workers(1).run(attempt, False, text, Layout(), settings(run, 2))
    assert f"add exp_manager.resume_fallback=true to go on from {before.name} (step 3)" in rank["error"]
    (rank,) = workers(1).run(attempt, False, text, Layout(), settings(run, 2, resume_fallback=True))
    assert "error" not in rank and rank["steps"] == STEPS - 4, rank  # the copy says that four steps are done
    assert last_step(run) == STEPS
    assert [path.name for path in (run / "damaged_checkpoints").iterdir()] == [last.name] and before.exists()


def test_two_runs_do_not_write_to_one_folder(killed, text, workers):
    from nemo_ee.files.output import claim

    with claim(killed):
        (rank,) = workers(1).run(attempt, False, text, Layout(), settings(killed, 2))
    assert rank["kind"] == "OutputError" and "is writing it" in rank["error"] and str(killed) in rank["error"]
    assert last_step(killed) == 4
