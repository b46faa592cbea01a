# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Exits added, removed and moved on a checkpoint: the others and the backbone keep every bit."""

import pytest
import torch

from nemo_ee.errors import ConfigError
from tests.support.tiny_gpt import HEADS, tiny_model, tiny_model_config, tiny_trainer


def exits_of(path: str) -> dict[str, torch.Tensor]:
    from nemo_ee.checkpoint import archive
    from nemo_ee.checkpoint.torch_dist import TorchDistCheckpoint

    checkpoint = TorchDistCheckpoint(archive.extract(path, path + ".content") / "model_weights")
    return {key.removeprefix("model."): checkpoint.read(key) for key in checkpoint.tensors}


def same(found: dict, at: int, expected: dict, source: int) -> None:
    mine = {key: value for key, value in found.items() if key.startswith(f"exits.{at}.")}
    assert mine
    for key, value in mine.items():
        assert value.equal(expected[key.replace(f"exits.{at}.", f"exits.{source}.")]), key


def edit(folder: str, head: str, writer: str) -> None:
    from nemo_ee.checkpoint.content_hash import backbone_content_hash
    from nemo_ee.models.exit_editor import edit_exits
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel

    first, second, third = (f"{folder}/{name}.nemo" for name in ("first", "second", "third"))
    written = tiny_model(tiny_model_config([2, 4, 6], HEADS[head]))
    written.cfg.target = writer
    written.save_to(first)
    assert (
        type(MegatronGPTEarlyExitModel.restore_from(first, trainer=tiny_trainer()))
        is MegatronGPTEarlyExitModel
    )
    edit_exits(first, second, [2, 5, 8], {6: 8}, tiny_trainer(), {"init": "copy"})
    before, after = exits_of(first), exits_of(second)
    assert {key.split(".")[1] for key in after if key.startswith("exits.")} == {"2", "5", "8"}
    same(after, 2, before, 2)
    same(after, 8, before, 6)
    assert backbone_content_hash(first) == backbone_content_hash(second)
    model = MegatronGPTEarlyExitModel.restore_from(second, trainer=tiny_trainer())
    assert model.early_exit.layers == (2, 5, 8)
    new, gpt = model.gpt.exits["5"], model.gpt
    if new.mlp is not None:
        layer = gpt.decoder.layers[4].mlp
        assert new.mlp.mlp.linear_fc1.weight.equal(layer.linear_fc1.weight)
    assert new.norm.weight.equal(gpt.decoder.final_layernorm.weight)
    if new.projection.kind == "untied":
        assert new.projection.weight.equal(gpt.output_weight())
    if new.projection.kind == "shortlist":
        assert new.projection.token_ids.equal(gpt.exits["2"].projection.token_ids)
    edit_exits(second, third, [8], {}, tiny_trainer())
    same(exits_of(third), 8, before, 6)


WRITERS = {
    "MLP, untied": "nemo_ee.models.megatron_gpt_ee_tuning_model.MegatronGPTEETuningModel",
    "block, shortlist": "nemo_ee.models.megatron_gpt_ee_pretraining_model.MegatronGPTEEPretrainingModel",
}
"""Head -> the class that wrote the checkpoint: a training script's, and not the one that edits it."""


@pytest.mark.parametrize("head", WRITERS)
def test_exits_that_stay_keep_every_bit(head, workers, tmp_path):
    workers(1).run(edit, str(tmp_path), head, WRITERS[head])


def add_to_plain(folder: str) -> None:
    from nemo_ee.checkpoint import archive
    from nemo_ee.checkpoint.content_hash import backbone_content_hash
    from nemo_ee.models.exit_editor import edit_exits
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel

    plain, edited = f"{folder}/plain.nemo", f"{folder}/edited.nemo"
    config = tiny_model_config([2], HEADS["norm, tied"])
    config.early_exit = None
    tiny_model(config).save_to(plain)
    section = {"init": "random", "head": HEADS["MLP, untied"]}
    model = edit_exits(plain, edited, [3, 6], {}, tiny_trainer(), section)
    assert model.gpt.exits["3"].projection.weight.std() > 0
    edit_exits(edited, f"{folder}/bare.nemo", [], {}, tiny_trainer(), {"init": "copy"})
    bare, base = (archive.read_config(path) for path in (f"{folder}/bare.nemo", plain))
    assert "early_exit" not in bare and bare.target.endswith("megatron_gpt_model.MegatronGPTModel")
    assert bare.tokenizer == base.tokenizer
    assert exits_of(f"{folder}/bare.nemo").keys() == exits_of(plain).keys()
    assert backbone_content_hash(f"{folder}/bare.nemo") == backbone_content_hash(plain)
    assert (
        MegatronGPTEarlyExitModel.restore_from(
            f"{folder}/bare.nemo", trainer=tiny_trainer()
        ).early_exit.layers
        == ()
    )
    for layers, section, key in (
        (3, {}, "layers"),
        (None, {}, "layers"),
        ([], {"head": {}}, "early_exit.head"),
    ):
        with pytest.raises(ConfigError) as caught:
            edit_exits(edited, f"{folder}/no.nemo", layers, {}, tiny_trainer(), section)
        assert [fault.key for fault in caught.value.faults] == [key]
    for layers, moves, key in (
        ([], {3: 4}, "moves.3"),
        ([3], {6: 4}, "moves.6"),
        ([3], {5: 3}, "moves.5"),
        ([4, 5], {3: 4, 6: 4}, "moves"),
    ):
        with pytest.raises(ConfigError) as caught:
            edit_exits(edited, f"{folder}/no.nemo", layers, moves, tiny_trainer())
        assert key in [fault.key for fault in caught.value.faults]
    with pytest.raises(ConfigError, match="overwrite"):
        edit_exits(plain, edited, [3], {}, tiny_trainer())
    with pytest.raises(ConfigError, match="shortlist"):
        edit_exits(plain, f"{folder}/no.nemo", [3], {}, tiny_trainer(), {"head": HEADS["linear, shortlist"]})


def test_exits_are_added_to_a_plain_checkpoint_and_taken_off_again(workers, tmp_path):
    workers(1).run(add_to_plain, str(tmp_path))
