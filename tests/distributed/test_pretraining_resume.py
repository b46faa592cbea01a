# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Pre-training that was killed and resumed is, bit for bit, the run that was not; it fits any layout."""

import os
import signal
from pathlib import Path

import pytest
import torch

from tests.distributed.test_pretraining_parallel import BEFORE, section
from tests.support.distributed import WorkerError
from tests.support.pretraining import Case, Recorder, pretraining_config, whole_parameters
from tests.support.tiny_gpt import fill
from tests.support.tuning import Layout, back_from_teardown, resume_in, tuning_trainer, write_text

STEPS, EVERY, KILLED_AT = 6, 2, 3
"""Steps of a run, steps between checkpoints, and the step after which one rank is killed."""

CASES = {
    "PP2, layers dropped": (
        Case(
            section("norm, tied", [2, 6], curriculum="rotational", layer_dropout=dict(max_rate=0.5)),
            initialise=True,
        ),
        Layout(pp=2),
    ),
    "PP3, filled": (
        Case(
            section("linear, shortlist", [2, 6], bubble_filling=dict(warmup=True, cooldown=True), **BEFORE),
            initialise=True,
        ),
        Layout(pp=3, first=1, last=2),
    ),
    "PP3, tied, while it writes": (Case(section("norm, tied", [2, 4, 6])), Layout(pp=3, first=2, last=3)),
    "batches grow": (  # by the step: 2, 2, 4, 6, 6, 6 samples; it is resumed at the third
        Case(
            section("MLP, untied", [2, 6], schedule="cosine", schedule_steps=5),
            dict(micro_batch_size=1, global_batch_size=6, rampup_batch_size=[2, 2, 8]),
        ),
        Layout(),
    ),
    "SP": (
        Case(section("block, MLP, linear, untied", [3], schedule="linear", schedule_steps=5)),
        Layout(tp=2, sp=True),
    ),
}


def run(prefixes: dict, folder: str, case: Case, layout: Layout, kill_at: int | None, writing: bool) -> dict:
    """One start of the training script, as far as it gets: to the end of a step, or to a checkpoint half written."""
    from lightning.pytorch.callbacks import Callback

    class Kill(Callback):
        def on_train_batch_end(self, trainer, *_):
            if not writing:
                self.kill(trainer)

        def on_save_checkpoint(self, trainer, *_):
            if writing:
                self.kill(trainer)

        def kill(self, trainer):
            if trainer.global_step == kill_at and trainer.global_rank == trainer.world_size - 1:
                os.kill(os.getpid(), signal.SIGKILL)

    trainer = tuning_trainer(layout, STEPS, val_check_interval=EVERY, callbacks=[Kill()])
    resume_in(folder, trainer)
    model = Recorder()(pretraining_config(prefixes, case, layout), trainer)
    fill(model)
    model.first_weights.complete = not case.initialise
    trainer.fit(model)
    back_from_teardown(model)
    optimizer = model.optimizers(use_pl_optimizer=False)
    return dict(
        losses=model.seen_losses,
        final=whole_parameters(model.gpt),
        moments=[state["exp_avg_sq"].clone() for state in optimizer.state.values()],
        steps={float(state["step"]) for state in optimizer.state.values()},
        consumed=float(trainer.logged_metrics["consumed_samples"]),
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_is_uninterrupted(name, text, workers, tmp_path):
    case, layout = CASES[name]
    pool, writing = workers(layout.world_size), "while it writes" in name
    whole = pool.run(run, text, str(tmp_path / "whole"), case, layout, None, False)
    with pytest.raises(WorkerError, match="exit code -9"):
        pool.run(
            run, text, str(tmp_path / "killed"), case, layout, 2 * EVERY if writing else KILLED_AT, writing
        )
    assert list(Path(tmp_path, "killed").rglob("*last*")), "the killed run left a checkpoint"
    assert bool(list(Path(tmp_path, "killed").rglob("*-unfinished"))) == writing
    resumed = pool.run(run, text, str(tmp_path / "killed"), case, layout, None, False)
    for mine, other in zip(resumed, whole, strict=True):
        assert len(other["losses"]) == STEPS
        assert mine["losses"] == other["losses"][EVERY:], "it goes on at the checkpoint"
        assert mine["consumed"] == other["consumed"]
        assert mine["steps"] == other["steps"] == {float(STEPS)}
        for key, value in other["final"].items():
            assert mine["final"][key].equal(value), key
        for found, expected in zip(mine["moments"], other["moments"], strict=True):
            assert found.equal(expected)


TRAVELLER = Case(section("block, MLP, linear, untied", [2, 4, 7]))
TIED = Case(section("norm, tied", [2, 4, 6]))


def first_file(prefixes: dict, case: Case, path: str) -> float:
    """Writes a model with weights by name; returns the loss of its next step."""
    trainer = tuning_trainer(Layout(), 1)
    model = Recorder()(pretraining_config(prefixes, case, Layout()), trainer)
    fill(model)
    model.first_weights.complete = True
    model.save_to(path)
    trainer.fit(model)
    return model.seen_losses[0]


def move(prefixes: dict, case: Case, layout: Layout, source: str, target: str | None) -> float | None:
    """Restores a file in a layout; saves it again, or without `target` takes a step and returns its loss."""
    trainer = tuning_trainer(layout, 1)
    config = pretraining_config(prefixes, case, layout)
    model = Recorder().restore_from(source, override_config_path=config, trainer=trainer)
    assert model.first_weights.complete
    if target is not None:
        model.save_to(target)
        return None
    trainer.fit(model)
    return model.seen_losses[0]


@pytest.mark.parametrize("case", [TRAVELLER, TIED], ids=["own weights", "tied"])
def test_a_checkpoint_travels_through_layouts(case, text, workers, tmp_path):
    from nemo_ee.checkpoint import archive
    from nemo_ee.checkpoint.torch_dist import TorchDistCheckpoint

    files = [str(tmp_path / f"{i}.nemo") for i in range(4)]
    (expected,) = workers(1).run(first_file, text, case, files[0])
    for source, target, layout in (
        (files[0], files[1], Layout(tp=2, pp=2)),
        (files[1], files[2], Layout(pp=4)),
        (files[2], files[3], Layout()),
    ):
        workers(layout.world_size).run(move, text, case, layout, source, target)
    contents = [TorchDistCheckpoint(archive.extract(f, f + ".content") / "model_weights") for f in files]
    assert contents[0].tensors.keys() == contents[3].tensors.keys()
    assert any(".exits." in f".{key}" for key in contents[0].tensors)
    for key in contents[0].tensors:
        assert torch.equal(contents[0].read(key), contents[3].read(key)), key
    assert workers(1).run(move, text, case, Layout(), files[3], None) == [expected]
