# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""`restore_from_ckpt`: weights and optimizer state of another run's checkpoint, everything else from the start."""

from pathlib import Path
from typing import Any

import pytest

from nemo_ee.errors import CheckpointError, ConfigError
from tests.distributed.test_pretraining_parallel import section
from tests.support.pretraining import Case, Recorder, pretraining_config, whole_parameters
from tests.support.tiny_gpt import fill
from tests.support.tuning import OPTIMIZER, Layout, resume_in, tuning_trainer, write_text

CASE, STEPS = Case(section("MLP, untied", [2, 6])), 2


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def train(
    prefixes: dict,
    folder: str,
    layout: Layout,
    case: Case = CASE,
    source: str | None = None,
    steps: int = STEPS,
) -> dict[str, Any]:
    """A run with checkpoints in `folder`, started as the script does."""
    from omegaconf import OmegaConf

    trainer = tuning_trainer(layout, steps, val_check_interval=min(2, steps))
    resume_in(folder, trainer)
    config = pretraining_config(prefixes, case, layout)
    config.restore_from_ckpt = source
    model = Recorder().start(OmegaConf.create(dict(model=config)), trainer)
    if source is None and not trainer.ckpt_path:
        fill(model)
        model.first_weights.complete = True
    began: dict[str, Any] = {}

    nemos = model.on_train_start

    def note() -> None:
        nemos()
        (optimizer,) = trainer.strategy._torch_optimizers()
        began.update(
            step=trainer.global_step,
            weights=whole_parameters(model.gpt),
            moments=[state["exp_avg_sq"].clone() for state in optimizer.state.values()],
            rate=optimizer.param_groups[0]["lr"],
            consumed=float(model.compute_consumed_samples(0)),
        )

    model.on_train_start = note
    trainer.fit(model)
    (optimizer,) = trainer.strategy._torch_optimizers()
    return dict(
        began=began,
        losses=model.seen_losses,
        weights=whole_parameters(model.gpt),
        moments=[state["exp_avg_sq"].clone() for state in optimizer.state.values()],
        counts={float(state["step"]) for state in optimizer.state.values()},
        consumed=float(trainer.logged_metrics["consumed_samples"]),
    )


def last_of(folder: Path) -> str:
    (found,) = (path for path in folder.rglob("*-last") if path.is_dir())
    return str(found)


@pytest.mark.parametrize(
    "layout", [Layout(), pytest.param(Layout(pp=2), marks=pytest.mark.slow)], ids=["one process", "PP2"]
)
@pytest.mark.parametrize("optimizer", ["adamw", "mcore_distributed_optim"])
def test_weights_and_moments_go_on_and_counters_begin(optimizer, layout, text, workers, tmp_path):
    pool, case = (
        workers(layout.world_size),
        Case(CASE.early_exit, dict(optim=dict(OPTIMIZER, name=optimizer))),
    )
    first = pool.run(train, text, str(tmp_path / "first"), layout, case)
    source = last_of(tmp_path / "first")
    second = pool.run(train, text, str(tmp_path / "second"), layout, case, source)
    for before, after in zip(first, second, strict=True):
        began = after["began"]
        assert began["step"] == 0 and began["consumed"] == 0
        assert began["rate"] == before["began"]["rate"], "the schedule of rates begins anew"
        for name, value in before["weights"].items():
            assert began["weights"][name].equal(value), name
        for mine, other in zip(began["moments"], before["moments"], strict=True):
            assert mine.equal(other)
        assert after["counts"] == {2.0 * STEPS} and before["counts"] == {float(STEPS)}
        assert after["consumed"] == before["consumed"], "it reads the text from its beginning"
        assert len(after["losses"]) == STEPS and after["losses"] != before["losses"]


@pytest.mark.slow
def test_a_run_that_has_a_checkpoint_of_its_own_goes_on_from_that(text, workers, tmp_path):
    pool, layout = workers(1), Layout()
    pool.run(train, text, str(tmp_path / "first"), layout, steps=1)
    source = last_of(tmp_path / "first")
    (whole,) = pool.run(train, text, str(tmp_path / "whole"), layout, CASE, source, 4)
    pool.run(train, text, str(tmp_path / "killed"), layout, CASE, source, 2)
    (resumed,) = pool.run(train, text, str(tmp_path / "killed"), layout, CASE, source, 4)
    assert resumed["began"]["step"] == 2
    assert resumed["losses"] == whole["losses"][2:] and resumed["consumed"] == whole["consumed"]


OTHERS: dict[str, Case] = {
    "model.early_exit.layers=[2]": Case(section("MLP, untied", [2])),
    "set 'model.early_exit.layers=[2, 6]'": Case(section("MLP, untied", [2, 4, 6])),
    "the model has no place for": Case(section("norm, tied", [2, 6])),
    "set ++model.rotary_percentage=1.0": Case(section("MLP, untied", [2, 6]), dict(rotary_percentage=0.5)),
    "set ++model.scale_positional_embedding=null": Case(
        section("MLP, untied", [2, 6]), dict(scale_positional_embedding=True)
    ),
    "another optimizer's state": Case(
        section("MLP, untied", [2, 6]), dict(optim=dict(OPTIMIZER, name="mcore_distributed_optim"))
    ),
    "other shapes": Case(section("MLP, untied", [2, 6]), dict(ffn_hidden_size=32)),
}
"""What the error says -> a model that is not the one of `CASE`."""


def refusals(prefixes: dict, folder: str, layout: Layout, source: str) -> dict[str, str]:
    said = {}
    for words, case in OTHERS.items():
        try:
            train(prefixes, f"{folder}/{len(said)}", layout, case, source)
        except (CheckpointError, ConfigError) as error:
            said[words] = str(error)
    return said


def test_a_training_checkpoint_of_another_model_is_refused(text, workers, tmp_path):
    layout = Layout(pp=2)
    workers(2).run(train, text, str(tmp_path / "first"), layout, steps=1)
    source = last_of(tmp_path / "first")
    for said in workers(2).run(refusals, text, str(tmp_path), layout, source):
        assert said.keys() == OTHERS.keys()
        for words, message in said.items():
            assert words in message and "nemo_ee_" not in message, message
