# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A run that was killed and resumed through NeMo's exp_manager is, bit for bit, the run that was not."""

import os
from pathlib import Path

import pytest
import torch

from tests.support.distributed import WorkerError
from tests.support.tuning import (
    Case,
    Layout,
    backbone_hash,
    outcome_of,
    prepared,
    resume_in,
    tuning_trainer,
    write_text,
)

STEPS, EVERY, KILLED_AT = 6, 2, 3
"""Steps of a run, steps between checkpoints, and the step after which the process dies."""

HEAD = dict(mlp=True, linear=True, projection="shortlist", shortlist_size=90, train_projection=True)
RIDGE = dict(tokens=256, penalty=0.01)
CASES = {
    "one process": (Case(dict(layers=[2, 8], head=HEAD, ridge=RIDGE), initialise=True), Layout()),
    "a stage without exits": (Case(dict(layers=[1, 2], head=HEAD, init="random")), Layout(pp=2)),
    "every stage has exits": (Case(dict(layers=[2, 6], head=HEAD, init="random")), Layout(pp=2)),
    "TP2 with SP": (
        Case(dict(layers=[3], head={**HEAD, "block": True, "projection": "untied"}, init="random")),
        Layout(tp=2, sp=True),
    ),
    "DP2": (Case(dict(layers=[2, 8], head=HEAD, init="random")), Layout(dp=2)),
    "truncated": (
        Case(
            dict(
                layers=[2, 6],
                head={**HEAD, "block": True},
                init="random",
                tuning=dict(ce_weight=1.0, kl_weight=0.0, argmax_weight=0.0),
            )
        ),
        Layout(pp=2),
    ),
}


def run(prefixes: dict, folder: str, case: Case, layout: Layout, kill_at: int | None):
    """One start of the training script, as far as it gets."""
    from lightning.pytorch.callbacks import Callback

    class Kill(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == kill_at:
                torch.distributed.barrier()
                os._exit(9)

    trainer = tuning_trainer(layout, STEPS, val_check_interval=EVERY, callbacks=[Kill()])
    resume_in(folder, trainer)
    model = prepared(prefixes, case, layout, trainer, torch.float32)
    before = backbone_hash(model)
    trainer.fit(model)
    return outcome_of(model, trainer, before)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


SLOW = {"every stage has exits", "DP2", "truncated"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_killed_and_resumed_is_uninterrupted(name, text, workers, tmp_path):
    case, layout = CASES[name]
    pool = workers(layout.world_size)
    whole = pool.run(run, text, str(tmp_path / "whole"), case, layout, None)
    with pytest.raises(WorkerError, match="exit code 9"):
        pool.run(run, text, str(tmp_path / "killed"), case, layout, KILLED_AT)
    assert list(Path(tmp_path, "killed").rglob("*last*")), "the killed run left a checkpoint"
    resumed = pool.run(run, text, str(tmp_path / "killed"), case, layout, None)
    for mine, other in zip(resumed, whole, strict=True):
        assert len(other.train) == STEPS and len(mine.train) == STEPS - EVERY, "it goes on at the checkpoint"
        assert mine.train == other.train[EVERY:]
        assert mine.rates == other.rates[EVERY:] and len(set(mine.rates)) > 1
        each = len(other.validation) * EVERY // STEPS
        assert mine.validation == other.validation[each:]
        assert mine.final.keys() == other.final.keys()
        for key, value in other.final.items():
            assert torch.equal(mine.final[key], value), key
        assert mine.optimizer.keys() == other.optimizer.keys()
        for key, state in other.optimizer.items():
            assert state["step"] == STEPS
            assert all(torch.equal(mine.optimizer[key][part], value) for part, value in state.items()), key
        assert mine.backbone_unchanged
    if name == "a stage without exits":
        assert whole[0].final and not whole[1].final
