# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A tensor of a checkpoint that the model has no place for is an error on every rank, however it is restored."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from nemo_ee.checkpoint import archive
from nemo_ee.errors import CheckpointError
from tests.support.tiny_gpt import GPT3, tiny_model, tiny_model_config, tiny_trainer

PLAIN: dict[str, Any] = dict(early_exit=None)
TIED = dict(layers=[2, 4], init="random", head=dict(mlp=False, linear=False, projection="tied"))
BASES: dict[str, dict[str, Any]] = {
    "biases on Q, K and V": dict(qkv_bias=True),
    "a norm of Q and K": dict(qk_layernorm=True),
    "learned positions": GPT3,
    "an output weight of its own": dict(share_embeddings_and_output_weights=False),
    "more layers": dict(num_layers=12),
    "exits": dict(early_exit=TIED),
    "a bias of the output layer": {},
}
"""What a base has beyond the plain model, and the keys of its configuration."""
RESTORED_AS: dict[str, tuple[dict[str, Any], str]] = {
    "biases on Q, K and V": (dict(qkv_bias=False), "model.decoder.layers.self_attention.linear_qkv.bias"),
    "a norm of Q and K": (dict(qk_layernorm=False), "model.decoder.layers.self_attention.k_layernorm.weight"),
    "learned positions": (
        dict(position_embedding_type="rope"),
        "model.embedding.position_embeddings.weight",
    ),
    "an output weight of its own": (
        dict(share_embeddings_and_output_weights=True),
        "model.output_layer.weight",
    ),
    "more layers": (dict(num_layers=8), "checkpoint (12, "),
    "exits": (dict(early_exit=None), "model.exits.2.norm.weight"),
    "a bias of the output layer": ({}, "model.output_layer.bias"),
}
"""Keys that another configuration has, and what the error must name."""


def write_bases(paths: dict[str, str]) -> None:
    from megatron.core.dist_checkpointing import ShardedTensor

    for what, path in paths.items():
        model = tiny_model(tiny_model_config(**{**PLAIN, **BASES[what]}))
        if what == "a bias of the output layer":
            state, key = model.sharded_state_dict(), "model.output_layer.bias"
            state[key] = ShardedTensor.from_rank_offsets(key, torch.ones(8), replica_id=0)
            model.sharded_state_dict = lambda state=state: state
        model.save_to(path)


def refusals(paths: dict[str, str], tp: int, pp: int) -> dict[str, str]:
    """What restoring each base says where the configuration has no place for a part of it."""
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel as Model

    sizes = dict(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    said = {}
    for what, path in paths.items():
        right = OmegaConf.merge(archive.read_config(path), sizes)
        if what != "a bias of the output layer":  # which no plain GPT has
            Model.restore_from(path, override_config_path=right, trainer=tiny_trainer(tp * pp))
        wrong = OmegaConf.merge(right, RESTORED_AS[what][0])
        try:
            Model.restore_from(path, override_config_path=wrong, trainer=tiny_trainer(tp * pp))
        except CheckpointError as error:
            said[what] = str(error)
    return said


@pytest.fixture(scope="module")
def bases(tmp_path_factory, workers) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    paths = {what: str(folder / f"{index}.nemo") for index, what in enumerate(BASES)}
    workers(1).run(write_bases, paths)
    return paths


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (1, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_restoring_names_what_has_no_place(tp, pp, bases, workers):
    """Under pipeline parallelism no stage alone has a place for everything."""
    for said in workers(tp * pp).run(refusals, bases, tp, pp):
        assert said.keys() == BASES.keys()
        for what, message in said.items():
            assert RESTORED_AS[what][1] in message, message
            assert bases[what] in message and "nemo_ee_restore" not in message, message


def truncated_refusals(paths: dict[str, str]) -> dict[str, str]:
    """The same for tuning without the layers above the last exit, which needs nothing of what it lacks."""
    from nemo_ee.models.megatron_gpt_ee_tuning_model import MegatronGPTEETuningModel as Tuning

    alone = dict(ce_weight=1.0, kl_weight=0.0, argmax_weight=0.0)
    section = dict(layers=[2], init="random", head=dict(projection="untied"), tuning=alone)
    said = {}
    for what in ("biases on Q, K and V", "more layers", "an output weight of its own"):
        right = Tuning.add_exits(archive.read_config(paths[what]), section)
        model = Tuning.restore_from(paths[what], override_config_path=right, trainer=tiny_trainer())
        assert model.gpt.truncated and len(model.gpt.decoder.layers) == 2
        wrong = OmegaConf.merge(right, dict(qkv_bias=False))
        try:
            Tuning.restore_from(paths[what], override_config_path=wrong, trainer=tiny_trainer())
        except CheckpointError as error:
            said[what] = str(error)
    return said


def test_a_truncated_model_leaves_what_lies_above_it_and_nothing_else(bases, workers):
    (said,) = workers(1).run(truncated_refusals, bases)
    assert said.keys() == {"biases on Q, K and V"} and "linear_qkv.bias" in said["biases on Q, K and V"]


def old_files(folder: str) -> dict[str, str]:
    """The same for `model_weights.ckpt`, the one file of old NeMo releases; and its own configuration loads."""
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel as Model

    model = tiny_model(tiny_model_config(**PLAIN, qkv_bias=True))
    Path(folder).mkdir()
    torch.save({f"model.{k}": v for k, v in model.gpt.state_dict().items()}, f"{folder}/model_weights.ckpt")
    OmegaConf.save(model.cfg, f"{folder}/model_config.yaml")
    again = Model.restore_from(folder, trainer=tiny_trainer())
    for mine, other in zip(again.gpt.parameters(), model.gpt.parameters(), strict=True):
        assert mine.equal(other)
    said = {}
    for key, value in (("qkv_bias", False), ("num_layers", 4), ("num_layers", 9), ("ffn_hidden_size", 32)):
        wrong = OmegaConf.merge(archive.read_config(folder), {key: value})
        try:
            Model.restore_from(folder, override_config_path=wrong, trainer=tiny_trainer())
        except CheckpointError as error:
            said[f"{key}={value}"] = str(error)
    return said


def test_files_of_old_releases_are_no_exception(workers, tmp_path):
    """NeMo logs a warning and goes on where only the checkpoint has more."""
    (said,) = workers(1).run(old_files, str(tmp_path / "old"))
    for change, words in {
        "qkv_bias=False": "beyond the model 8 tensors",
        "num_layers=4": "model.decoder.layers.4.",
        "num_layers=9": "lacks",
        "ffn_hidden_size=32": "in other shapes",
    }.items():
        assert words in said[change] and str(tmp_path) in said[change], said[change]


def tampered_exits(folder: str) -> str:
    """Exits of one block more than their configuration says."""
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel as Model

    base, exits = f"{folder}/base.nemo", f"{folder}/exits.nemo"
    tiny_model(tiny_model_config(**PLAIN)).save_to(base)
    section = dict(layers=[2], init="random", head=dict(block=True, projection="untied"))
    config = Model.add_exits(archive.read_config(base), section)
    Model.restore_from(base, override_config_path=config, trainer=tiny_trainer()).save_adapters(exits)
    Model.restore_with_exits(base, exits, tiny_trainer())
    root = archive.extract(exits, f"{folder}/content")
    config = OmegaConf.load(root / archive.CONFIG_NAME)
    config.early_exit.head.block = False
    OmegaConf.save(config, root / archive.CONFIG_NAME)
    archive.write_archive(root, exits)
    try:
        Model.restore_with_exits(base, exits, tiny_trainer())
    except CheckpointError as error:
        return str(error)
    return ""


def test_loading_exits_names_what_has_no_place(workers, tmp_path):
    (said,) = workers(1).run(tampered_exits, str(tmp_path))
    assert "model.exits.2.block." in said and "exits.nemo" in said
