# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Exits with heads of their own in tuning, pre-training and every kind of checkpoint."""

import pytest
import torch
from omegaconf import OmegaConf

from nemo_ee.checkpoint.exits import adapter
from nemo_ee.errors import ConfigError
from tests.distributed.test_continuing import configuration
from tests.distributed.test_exit_editor import exits_of, same
from tests.distributed.test_exits_of_other_layers import (
    assert_same,
    loaded,
    of_exit,
    tuned,
    write_base,
)
from tests.support import tiny_llama
from tests.support.tiny_gpt import HEADS, tiny_model, tiny_model_config, tiny_trainer
from tests.support.tuning import Layout, tuning_trainer, whole_exits, write_text

FIRST = dict(mlp="none", projection="shortlist", shortlist_size=24, train_projection=True)
SECOND = dict(mlp="beside", block=True, projection="tied")
THIRD = dict(mlp="none", projection="shortlist", shortlist_size=40, train_projection=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"), vocabulary=100)


@pytest.fixture(scope="module")
def bases(tmp_path_factory, workers, text):
    """A base, exits tuned on it at layers 1, 2 and 3, the merged file, and the exits' weights."""
    folder = tmp_path_factory.mktemp("base")
    base, exits, whole = (str(folder / name) for name in ("base.nemo", "exits.nemo", "whole.nemo"))
    workers(1).run(write_base, str(tiny_llama.write(folder / "hf")), base)
    (run,) = workers(1).run(tuned, base, [1, 2, 3], [FIRST, SECOND, THIRD], text, Layout(), exits)
    adapter.merge(base, exits, whole)
    return base, exits, whole, run


def test_each_is_tuned_with_its_own_modules(bases, workers):
    base, exits, whole, run = bases
    shapes = {n: of_exit(run["final"], n) for n in (1, 2, 3)}
    rows = {n: len(value) for n in (1, 3) for name, value in shapes[n].items() if name.endswith("token_ids")}
    assert rows == {1: 24, 3: 40}
    assert any(".block." in name for name in shapes[2]) and not any(".block." in name for name in shapes[1])
    small, large = (
        next(value for name, value in shapes[n].items() if name.endswith("token_ids")).tolist()
        for n in (1, 3)
    )
    assert set(small) < set(large), "of the same text"
    for n in (1, 2, 3):
        changed = [name for name, value in shapes[n].items() if not value.equal(run["initial"][name])]
        assert changed, n
    (found,) = workers(1).run(loaded, base, exits)
    assert_same(found, run["final"])


def test_what_is_the_same_goes_on_exit_by_exit(bases, text, workers):
    """One entry of three is another: that exit begins anew, with the new size's tokens of the text."""
    base, _, whole, run = bases
    other = [FIRST, SECOND, {**THIRD, "shortlist_size": 30}]
    (found,) = workers(1).run(tuned, whole, [1, 2, 3], other, text, Layout())
    (plain,) = workers(1).run(tuned, base, [1, 2, 3], other, text, Layout())
    for n in (1, 2):
        assert_same(of_exit(found["initial"], n), of_exit(run["final"], n))
    assert_same(of_exit(found["initial"], 3), of_exit(plain["initial"], 3))


def test_two_stages_tune_the_same(bases, text, workers):
    base, _, _, run = bases
    seen = {}
    for mine in workers(2).run(tuned, base, [1, 2, 3], [FIRST, SECOND, THIRD], text, Layout(pp=2)):
        seen |= mine["initial"]
    assert seen.keys() == run["initial"].keys()
    for name, value in run["initial"].items():
        assert seen[name].shape == value.shape and (value.is_floating_point() or seen[name].equal(value)), (
            name
        )


def continued(base: str, prefixes: dict) -> dict[str, torch.Tensor]:
    """The exits with which continued pre-training begins; it makes its steps."""
    from nemo_ee.models.megatron_gpt_ee_pretraining_model import MegatronGPTEEPretrainingModel

    trainer = tuning_trainer(Layout(), 1, limit_val_batches=0)
    cfg = configuration(prefixes, {"model.restore_from_path": base, "model.early_exit.layers": [1, 2, 3]})
    cfg.model.early_exit.head = OmegaConf.create([FIRST, SECOND, THIRD])
    model = MegatronGPTEEPretrainingModel.start(cfg, trainer)
    found: dict[str, torch.Tensor] = {}
    model.on_train_start = lambda: found.update(whole_exits(model.gpt))
    trainer.fit(model)
    return found


def test_pretraining_goes_on(bases, text, workers):
    _, _, whole, run = bases
    (found,) = workers(1).run(continued, whole, text)
    assert_same(found, run["final"])


def edit(folder: str) -> None:
    from nemo_ee.models.exit_editor import edit_exits

    first, second, third = (f"{folder}/{name}.nemo" for name in ("first", "second", "third"))
    heads = [HEADS[name] for name in ("norm, tied", "block, shortlist", "MLP, untied")]
    tiny_model(tiny_model_config([2, 4, 6], heads)).save_to(first)
    edited = edit_exits(first, second, [3, 4], {6: 3}, tiny_trainer())
    assert edited.early_exit.heads[3].projection == "untied" and edited.early_exit.heads[4].block
    before, after = exits_of(first), exits_of(second)
    same(after, 3, before, 6)
    same(after, 4, before, 4)
    with pytest.raises(ConfigError, match="head for each exit, and none for .5."):
        edit_exits(first, third, [2, 5], {}, tiny_trainer(), {"init": "copy"})
    section = {
        "init": "copy",
        "head": [HEADS["norm, tied"], HEADS["block, shortlist"], HEADS["block, shortlist"]],
    }
    edited = edit_exits(first, third, [2, 4, 5], {}, tiny_trainer(), section)
    assert edited.gpt.exits["5"].projection.token_ids.equal(edited.gpt.exits["4"].projection.token_ids)
    same(exits_of(third), 4, before, 4)


def test_the_editor_moves_heads_along(workers, tmp_path):
    workers(1).run(edit, str(tmp_path))
