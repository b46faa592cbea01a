# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint with exits, trained at other layers: what is the same goes on, the rest begins as on the plain base."""

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from nemo_ee.checkpoint.content_hash import backbone_content_hash
from nemo_ee.checkpoint.exits import adapter
from tests.distributed.test_continuing import configuration
from tests.support import tiny_llama
from tests.support.tuning import (
    OPTIMIZER,
    Layout,
    data_section,
    outcome_of,
    recorder,
    tuning_trainer,
    whole_exits,
    write_text,
)

HEAD = dict(mlp=True, linear=True, projection="shortlist", shortlist_size=40, train_projection=True)
OTHER_HEAD = {**HEAD, "mlp": False}


def write_base(source: str, base: str) -> None:
    from nemo_ee.checkpoint.conversion.convert import convert_to_nemo

    convert_to_nemo(source, base)


def tuned(
    base: str, layers: list[int], head: dict, prefixes: dict, layout: Layout, save_to: str | None = None
) -> dict[str, Any]:
    """One step of tuning as the script starts it: the exits before and after it, and the base's hash."""
    section = dict(layers=layers, head=head, init="ridge", ridge=dict(tokens=512))
    model = dict(
        restore_from_path=base,
        early_exit=section,
        micro_batch_size=2,
        global_batch_size=4,
        pipeline_model_parallel_size=layout.pp,
        optim=OPTIMIZER,
        data=data_section(prefixes),
    )
    trainer = tuning_trainer(layout, 1)
    cfg = OmegaConf.create(dict(model=model, trainer=dict(precision=32)))
    started = recorder().restore_base(cfg, trainer)
    trainer.fit(started)
    outcome = outcome_of(started, trainer, "")
    if save_to:
        started.save_adapters(save_to)
    return dict(initial=outcome.initial, final=outcome.final, base=started.base_checkpoint.content_hash)


def continued(base: str, layers: list[int], head: dict, prefixes: dict) -> dict[str, torch.Tensor]:
    """The exits with which continued pre-training begins, and the backbone's final norm."""
    from nemo_ee.models.megatron_gpt_ee_pretraining_model import MegatronGPTEEPretrainingModel

    changes = {
        "model.restore_from_path": base,
        "model.early_exit.layers": layers,
        "model.early_exit.head": head,
    }
    trainer = tuning_trainer(Layout(), 1, limit_val_batches=0)
    model = MegatronGPTEEPretrainingModel.start(configuration(prefixes, changes), trainer)
    found: dict[str, torch.Tensor] = {}

    def note() -> None:
        found.update(whole_exits(model.gpt), norm=model.gpt.decoder.final_layernorm.weight.detach().clone())

    model.on_train_start = note
    trainer.fit(model)
    return found


def of_exit(weights: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights.items() if f".{layer}." in f".{name}"}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found and found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].equal(value), name


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"), vocabulary=100)


@pytest.fixture(scope="module")
def merged(tmp_path_factory, workers, text) -> tuple[str, str, dict[str, torch.Tensor]]:
    """A base, the same with exits at layers 1 and 2, and their weights."""
    folder = tmp_path_factory.mktemp("base")
    base, exits, whole = (str(folder / name) for name in ("base.nemo", "exits.nemo", "merged.nemo"))
    workers(1).run(write_base, str(tiny_llama.write(folder / "hf")), base)
    (before,) = workers(1).run(tuned, base, [1, 2], HEAD, text, Layout(), exits)
    adapter.merge(base, exits, whole)
    return base, whole, before["final"]


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2)], ids=["one process", "PP2"])
def test_tuning_keeps_what_is_the_same_and_begins_the_rest_anew(layout, merged, text, workers):
    """On two stages the exit that has the shortlist lies on the first, and the new one on the second."""
    base, whole, trained = merged
    plain = workers(layout.world_size).run(tuned, base, [2, 3], HEAD, text, layout)
    found = workers(layout.world_size).run(tuned, whole, [2, 3], HEAD, text, layout)
    seen: dict[str, torch.Tensor] = {}
    for mine, other in zip(found, plain, strict=True):
        assert mine["base"] == other["base"] == backbone_content_hash(base)
        expected = other["initial"] | {
            name: value for name, value in trained.items() if name in of_exit(other["initial"], 2)
        }
        assert_same(mine["initial"], expected)
        seen |= mine["initial"]
    assert of_exit(seen, 2) and of_exit(seen, 3) and not of_exit(seen, 1)


def test_tuning_begins_exits_of_another_head_anew(merged, text, workers):
    base, whole, _ = merged
    (plain,) = workers(1).run(tuned, base, [1, 2], OTHER_HEAD, text, Layout())
    (found,) = workers(1).run(tuned, whole, [1, 2], OTHER_HEAD, text, Layout())
    assert_same(found["initial"], plain["initial"])


def test_continued_pretraining_does_the_same(merged, text, workers):
    _, whole, trained = merged
    (found,) = workers(1).run(continued, whole, [2, 3], HEAD, text)
    final_norm = found.pop("norm")
    assert_same(of_exit(found, 2), of_exit(trained, 2))
    (norm,) = (value for name, value in of_exit(found, 3).items() if name.endswith("3.norm.weight"))
    assert norm.equal(final_norm) and not of_exit(found, 1)
    kept, new = (value for name, value in sorted(found.items()) if name.endswith("token_ids"))
    assert new.equal(kept), "one shortlist for all exits"


def loaded(base: str, exits: str) -> dict[str, torch.Tensor]:
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel as Model
    from tests.support.tiny_nemo import tiny_trainer

    return whole_exits(Model.restore_with_exits(base, exits, tiny_trainer()).gpt)


def test_exits_are_loaded_instead_of_those_that_a_file_has(merged, text, workers, tmp_path):
    base, whole, _ = merged
    exits = str(tmp_path / "exits.nemo")
    (before,) = workers(1).run(tuned, base, [2, 4], OTHER_HEAD, text, Layout(), exits)
    (found,) = workers(1).run(loaded, whole, exits)
    assert_same(found, before["final"])
