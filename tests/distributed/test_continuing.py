# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Continued pre-training starts from the model that the checkpoint holds: its first losses are Hugging Face's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from tests.support import tiny_bases
from tests.support.pretraining import Recorder
from tests.support.tuning import Layout, tuning_trainer, write_text

CONF = str(Path(__file__).parents[2] / "conf")
LOSS_TOLERANCE = 1e-4
"""Float32 against float32 of another implementation, at losses of about 5."""
GIVEN = {
    "trainer.precision": 32,
    "model.micro_batch_size": 2,
    "model.global_batch_size": 4,
    "model.early_exit.layers": [2],
    "model.early_exit.init": "copy",
    "model.optim.lr": 0.0,  # validation sees the weights of the first step
    "model.optim.sched.min_lr": 0.0,
    "model.data.eod_mask_loss": False,
}


def configuration(prefixes: dict, overrides: dict[str, Any]) -> Any:
    """`conf/megatron_gpt_ee_pretraining.yaml` as the script sees it, with overrides."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(CONF, version_base=None):
        cfg = compose("megatron_gpt_ee_pretraining")
    OmegaConf.set_struct(cfg, False)
    for key, value in {**GIVEN, "model.data.data_prefix": prefixes, **overrides}.items():
        OmegaConf.update(cfg, key, value)
    OmegaConf.resolve(cfg)
    return cfg


def convert_all(folders: dict[str, tuple[str, str]]) -> None:
    for family, (source, path) in folders.items():
        tiny_bases.to_nemo(family, source, path)


def first_losses(bases: dict[str, str], prefixes: dict, layout: Layout) -> dict[str, dict[str, Any]]:
    """Continues every base by one step; its loss, that of a validation, and the tokens that both read."""

    class Watched(Recorder()):
        def get_batch(self, *args: Any) -> dict:
            batch = super().get_batch(*args)
            if self.trainer.training or self.trainer.validating:
                self.read[bool(self.trainer.training)].append((batch["tokens"], batch["labels"]))
            return batch

    found = {}
    for family, path in bases.items():
        sizes = {
            "model.tensor_model_parallel_size": layout.tp,
            "model.pipeline_model_parallel_size": layout.pp,
        }
        cfg = configuration(prefixes, {"model.restore_from_path": path, **sizes})
        trainer = tuning_trainer(layout, 1, limit_val_batches=1)
        model = Watched.start(cfg, trainer)
        model.read = {True: [], False: []}
        trainer.fit(model)
        found[family] = dict(
            loss=model.seen_losses[0],
            val_loss=float(trainer.logged_metrics["val_loss"]),
            read=model.read,
            positions=(model.cfg.encoder_seq_length, model.cfg.data.seq_length),
        )
    return found


@torch.no_grad()
def theirs(source: str, read: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Hugging Face's mean cross-entropy."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(source).eval()
    losses = []
    for tokens, labels in read:
        logits = network(tokens).logits
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), labels.flatten()))
    return torch.stack(losses).mean().item()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, workers) -> dict[str, tuple[str, str]]:
    """Family -> its Hugging Face directory and its NeMo checkpoint."""
    where = {}
    for index, family in enumerate(tiny_bases.FAMILIES):
        folder = tmp_path_factory.mktemp(f"base_{index}")
        where[family] = (str(tiny_bases.write(family, folder / "hf")), str(folder / "base.nemo"))
    workers(1).run(convert_all, where)
    return where


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"), vocabulary=tiny_bases.VOCABULARY)


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tp=2), pytest.param(Layout(tp=2, pp=2), marks=pytest.mark.slow)],
    ids=lambda layout: f"TP{layout.tp} x PP{layout.pp}",
)
def test_first_losses_are_hugging_faces(layout, folders, text, workers):
    """At no TP do the rows that pad the vocabulary of 101 enter; sequences have the checkpoint's length."""
    bases = {family: path for family, (_, path) in folders.items()}
    of_last_stage = workers(layout.world_size).run(first_losses, bases, text, layout)[-1]
    assert of_last_stage.keys() == folders.keys()
    for family, outcome in of_last_stage.items():
        source, read = folders[family][0], outcome["read"]
        assert outcome["positions"] == (tiny_bases.POSITIONS, tiny_bases.POSITIONS)
        assert read[True][0][0].shape == (2, tiny_bases.POSITIONS)
        for name, step in (("loss", read[True]), ("val_loss", read[False])):
            expected = theirs(source, step)
            assert outcome[name] == pytest.approx(expected, abs=LOSS_TOLERANCE), (family, name)
