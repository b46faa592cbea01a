# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A run goes on with other kernels of AdamW than it began with, as from a CPU to a GPU and back."""

from typing import Any

import pytest

from tests.distributed.test_pretraining_parallel import section
from tests.support.pretraining import Case, Recorder, largest_gap, pretraining_config, whole_parameters
from tests.support.tiny_gpt import fill
from tests.support.tuning import OPTIMIZER, Layout, resume_in, tuning_trainer, write_text

STEPS = 2
KINDS = {
    "adamw": dict(name="adamw"),
    "distributed": dict(name="mcore_distributed_optim"),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def train(prefixes: dict, folder: str, kind: str, fused: bool | None, steps: int) -> dict[str, Any]:
    """A run with checkpoints in `folder`, from the last one there."""
    settings = {**OPTIMIZER, **KINDS[kind], "fused": fused}
    del settings["sched"]  # which depends on the last step
    case, layout = Case(section("MLP, untied", [2, 6]), dict(optim=settings)), Layout()
    trainer = tuning_trainer(layout, steps, val_check_interval=STEPS)
    resume_in(folder, trainer)
    model = Recorder()(pretraining_config(prefixes, case, layout), trainer)
    fill(model)
    model.first_weights.complete, model.keep_gradients = True, False
    trainer.fit(model)
    (optimizer,) = trainer.strategy._torch_optimizers()
    return dict(
        losses=model.seen_losses,
        final=whole_parameters(model.gpt),
        fused={group["fused"] for group in optimizer.param_groups},
        counts={float(state["step"]) for state in optimizer.state.values()},
    )


def run(prefixes: dict, folder: str, kind: str) -> list[dict[str, Any]]:
    """Uninterrupted with the default; from others to the default; and back."""
    return [
        train(prefixes, f"{folder}/whole", kind, None, 2 * STEPS),
        train(prefixes, f"{folder}/first", kind, False, STEPS),
        train(prefixes, f"{folder}/first", kind, None, 2 * STEPS),
        train(prefixes, f"{folder}/second", kind, True, STEPS),
        train(prefixes, f"{folder}/second", kind, False, 2 * STEPS),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_those_of_the_run_and_change_nothing(kind, text, workers, tmp_path):
    ((whole, _, to_fused, _, from_fused),) = workers(1).run(run, text, str(tmp_path), kind)
    for resumed, fused in ((whole, True), (to_fused, True), (from_fused, False)):
        assert resumed["fused"] == {fused} and resumed["counts"] == {2.0 * STEPS}
    for resumed in (to_fused, from_fused):
        assert resumed["losses"] == pytest.approx(whole["losses"][STEPS:], rel=1e-6)
        gap, where = largest_gap(resumed["final"], whole["final"])
        assert gap < 1e-5, (where, gap)
