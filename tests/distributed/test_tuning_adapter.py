# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Tuning that starts from exits tuned before (`model.adapter_path`); killed and resumed, it goes on from its own
checkpoint, not from those exits again."""

import os
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tests.support import tiny_llama
from tests.support.distributed import WorkerError
from tests.support.tuning import (
    OPTIMIZER,
    Layout,
    backbone_hash,
    data_section,
    outcome_of,
    recorder,
    resume_in,
    tuning_trainer,
    whole_exits,
    write_text,
)

STEPS, EVERY, KILLED_AT = 4, 2, 3
HEAD = dict(mlp=True, linear=True, projection="untied", train_projection=True)


def restored(base: str, adapter: str | None, prefixes: dict, trainer):
    """The model that the tuning script makes of its configuration."""
    model = dict(
        restore_from_path=base,
        adapter_path=adapter,
        early_exit=dict(layers=[1, 3], head=HEAD, init="random"),
        micro_batch_size=2,
        global_batch_size=4,
        optim=OPTIMIZER,
        data=data_section(prefixes),
    )
    return recorder().restore_base(OmegaConf.create(dict(model=model, trainer=dict(precision=32))), trainer)


def write_base(source: str, base: str) -> None:
    from nemo_ee.checkpoint.conversion.convert import convert_to_nemo

    convert_to_nemo(source, base)


def write_exits(base: str, prefixes: dict, adapter: str) -> dict[str, torch.Tensor]:
    """Saves exits of random weights; returns them."""
    model = restored(base, None, prefixes, tuning_trainer(Layout(), STEPS))
    with torch.no_grad():
        for parameter in model.gpt.exits.parameters():
            parameter.normal_(std=0.1)
    model.save_adapters(adapter)
    return whole_exits(model.gpt)


def run(base: str, adapter: str, prefixes: dict, folder: str, kill_at: int | None):
    """One start of the training script, as far as it gets."""
    from lightning.pytorch.callbacks import Callback

    class Kill(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == kill_at:
                os._exit(9)

    trainer = tuning_trainer(Layout(), STEPS, val_check_interval=EVERY, callbacks=[Kill()])
    resume_in(folder, trainer)
    model = restored(base, adapter, prefixes, trainer)
    before = backbone_hash(model)
    trainer.fit(model)
    return outcome_of(model, trainer, before)


def test_resumed_it_goes_on_from_its_checkpoint(workers, tmp_path):
    pool, base, adapter = workers(1), str(tmp_path / "base.nemo"), str(tmp_path / "exits.nemo")
    pool.run(write_base, str(tiny_llama.write(tmp_path / "hf")), base)
    text = write_text(tmp_path, vocabulary=100)
    (given,) = pool.run(write_exits, base, text, adapter)
    (whole,) = pool.run(run, base, adapter, text, str(tmp_path / "whole"), None)
    with pytest.raises(WorkerError, match="exit code 9"):
        pool.run(run, base, adapter, text, str(tmp_path / "killed"), KILLED_AT)
    assert list(Path(tmp_path, "killed").rglob("*last*")), "the killed run left a checkpoint"
    (resumed,) = pool.run(run, base, adapter, text, str(tmp_path / "killed"), None)
    assert len(whole.train) == STEPS and len(resumed.train) == STEPS - EVERY
    assert resumed.train == whole.train[EVERY:]
    for name, value in given.items():
        assert whole.initial[name].equal(value), "it starts from the exits that it was given"
        assert not resumed.initial[name].equal(value), "not again"
        assert resumed.final[name].equal(whole.final[name])
    for name, state in whole.optimizer.items():
        assert all(resumed.optimizer[name][part].equal(value) for part, value in state.items()), name
    assert whole.backbone_unchanged and resumed.backbone_unchanged
