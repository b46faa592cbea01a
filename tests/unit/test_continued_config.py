# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What continued pre-training and tuning make of a checkpoint's configuration and the script's."""

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

from nemo_ee.checkpoint import archive
from nemo_ee.errors import ConfigError
from nemo_ee.models.checks.model_checks import check_model, check_pretraining, check_tuning
from nemo_ee.models.megatron_gpt_ee_pretraining_model import MegatronGPTEEPretrainingModel as Pretraining
from nemo_ee.models.megatron_gpt_ee_tuning_model import MegatronGPTEETuningModel as Tuning
from nemo_ee.models.runs.resumed_checkpoint import checkpoint_to_start_from
from tests.support.tiny_gpt import GPT3, tiny_model_config

CONF = str(Path(__file__).parents[2] / "conf")
OLD_LAYOUT = dict(  # what NeMo's examples and clusters leave in a checkpoint
    megatron_amp_O2=True,
    context_parallel_size=2,
    expert_model_parallel_size=2,
    virtual_pipeline_model_parallel_size=2,
    tensor_model_parallel_size=8,
    pipeline_model_parallel_size=4,
    sequence_parallel=True,
    ub_tp_comm_overlap=True,
    fsdp=True,
    enable_cuda_graph=True,
    rampup_batch_size=[8, 8, 100],
    activations_checkpoint_granularity="full",
    gradient_accumulation_fusion=True,
    defer_embedding_wgrad_compute=True,
    fp8=True,
    fp8_e4m3=True,
    dist_ckpt_format="zarr",
    optim=dict(name="distributed_fused_adam", overlap_grad_sync=True),
)


def checkpoint(folder: Path, **changes: Any) -> str:
    """A folder with a checkpoint's configuration; nothing else of it is read here."""
    config = tiny_model_config(**changes)
    with open_dict(config):
        del config["early_exit"]
    folder.mkdir()
    OmegaConf.save(config, folder / archive.CONFIG_NAME)
    (folder / archive.WEIGHTS_DIRECTORY).mkdir()
    return str(folder)


def script(name: str, *words: str) -> Any:
    """A script's configuration, resolved as `EarlyExitTrainerBuilder` leaves it."""
    given = ["model.early_exit.layers=[2]", "model.data.data_prefix=[text]", "trainer.precision=32", *words]
    with initialize_config_dir(CONF, version_base=None):
        cfg = compose(name, overrides=given)
    OmegaConf.resolve(cfg)
    return cfg


def test_the_old_runs_layout_is_forgotten(tmp_path):
    path = checkpoint(tmp_path / "c", **OLD_LAYOUT)
    where = f"model.restore_from_path={path}"
    continued = Pretraining.continued_config(script("megatron_gpt_ee_pretraining", where))
    check_pretraining(continued)
    check_model(continued, 1)
    tuned = Tuning.merge_cfg_with(path, script("megatron_gpt_ee_tuning", where, "model.data.seq_length=64"))
    check_tuning(tuned)
    check_model(tuned, 1)
    for config in (continued, tuned):
        for key, old in OLD_LAYOUT.items():
            assert config.get(key) != old, key
        assert config.optim.name == "adamw" and "overlap_grad_sync" not in config.optim


def test_the_model_is_the_checkpoints(tmp_path):
    model = dict(
        qkv_bias=True, scale_positional_embedding=True, scale_factor=32.0, unheard_of=1, kv_channels=12
    )
    path = checkpoint(tmp_path / "c", **model)
    config = Pretraining.continued_config(
        script("megatron_gpt_ee_pretraining", f"model.restore_from_path={path}")
    )
    for key, value in model.items():
        assert config[key] == value
    assert (config.num_layers, config.encoder_seq_length, config.max_position_embeddings) == (8, 64, 64)
    assert config.data.seq_length == 64 and list(config.early_exit.layers) == [2]


def test_given_lengths_count_where_positions_are_rotary(tmp_path):
    path = checkpoint(tmp_path / "c")
    words = f"model.restore_from_path={path} model.encoder_seq_length=16"
    cfg = script("megatron_gpt_ee_pretraining", *shlex.split(words))
    config = Pretraining.continued_config(cfg, {"encoder_seq_length"})
    assert (config.encoder_seq_length, config.data.seq_length, config.max_position_embeddings) == (16, 16, 64)
    check_pretraining(config)


def test_a_length_of_the_data_alone_is_a_fault(tmp_path):
    path = checkpoint(tmp_path / "c")
    cfg = script("megatron_gpt_ee_pretraining", f"model.restore_from_path={path}", "model.data.seq_length=32")
    config = Pretraining.continued_config(cfg, {"data.seq_length"})
    with pytest.raises(ConfigError, match=r"model.data.seq_length=32: .*; set ..model.encoder_seq_length=32"):
        check_pretraining(config)


def test_what_the_tensors_follow_from_cannot_be_given_otherwise(tmp_path):
    path = checkpoint(tmp_path / "c")
    words = f"model.restore_from_path={path} model.num_layers=4 model.hidden_size=64 model.num_query_groups=2"
    cfg = script("megatron_gpt_ee_pretraining", *words.split())
    with pytest.raises(ConfigError) as raised:
        Pretraining.continued_config(cfg, {"num_layers", "hidden_size", "num_query_groups"})
    assert [fault.key for fault in raised.value.faults] == ["model.num_layers", "model.num_query_groups"]
    assert f"model.num_layers=4: the weights of {path} were saved with 8" in str(raised.value)
    cfg = script("megatron_gpt_ee_tuning", f"model.restore_from_path={path}", "+model.qkv_bias=true")
    with pytest.raises(ConfigError, match="model.qkv_bias=true: .* saved with None; leave it out"):
        Tuning.merge_cfg_with(path, cfg)


def test_learned_positions_have_one_length(tmp_path):
    path = checkpoint(tmp_path / "c", **GPT3)
    where = f"model.restore_from_path={path}"
    assert Pretraining.continued_config(script("megatron_gpt_ee_pretraining", where)).data.seq_length == 64
    cfg = script("megatron_gpt_ee_pretraining", where, "model.encoder_seq_length=16")
    with pytest.raises(ConfigError, match="model.encoder_seq_length=16: .* 64 learned positions; use 64"):
        Pretraining.continued_config(cfg, {"encoder_seq_length"})


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("model.restore_from_ckpt=FOLDER/none", "model.restore_from_ckpt=FOLDER/none: no such directory"),
        (
            "model.restore_from_ckpt=FOLDER",
            "model.restore_from_ckpt=FOLDER: has no checkpoint of a training run",
        ),
        ("model.restore_from_ckpt=FOLDER/a.nemo", "model.restore_from_path=FOLDER/a.nemo"),
        (
            "model.restore_from_ckpt=FOLDER/a model.restore_from_path=FOLDER/b.nemo",
            "model.restore_from_ckpt=null",
        ),
    ],
)
def test_sources_that_are_none(words, fault, tmp_path):
    cfg = script("megatron_gpt_ee_pretraining", *words.replace("FOLDER", str(tmp_path)).split())
    with pytest.raises(ConfigError) as raised:
        Pretraining.start(cfg, SimpleNamespace(ckpt_path=None))
    assert fault.replace("FOLDER", str(tmp_path)) in str(raised.value)


def test_a_run_to_start_from_may_be_named_by_its_directory(tmp_path):
    last = tmp_path / "checkpoints" / "run--val_loss=1.0-step=4-last"
    last.mkdir(parents=True)
    (last / "metadata.json").touch()
    for named in (tmp_path, tmp_path / "checkpoints", last):
        cfg = OmegaConf.create(dict(restore_from_ckpt=str(named)))
        assert checkpoint_to_start_from(cfg) == str(last)


def test_a_run_with_a_checkpoint_of_its_own_does_not_ask_for_what_it_started_from(monkeypatch, tmp_path):
    monkeypatch.setattr(Pretraining, "__init__", lambda self, cfg, trainer: None)
    cfg = script("megatron_gpt_ee_pretraining", f"model.restore_from_ckpt={tmp_path}/gone")
    trainer = SimpleNamespace(ckpt_path="mine")
    Pretraining.start(cfg, trainer)
    assert trainer.ckpt_path == "mine" and cfg.model.restore_from_ckpt is None
