# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""NeMo's own checkpoints go through every script: it works, or one error refuses it, whose remedy works.

Their configurations say unusual things of the run that wrote them, which must not matter.
"""

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tests.support import nemo_confs
from tests.support.tiny_gpt import tokenizer_folder
from tests.support.tuning import Layout, tuning_trainer, write_text

CONF = str(Path(__file__).parents[2] / "conf")
LOGIT_TOLERANCE = 3e-5
"""Float32 of two implementations, at logits of about 5."""
QUICK = ("megatron_gpt_config", "megatron_chatglm_config")
"""Learned positions, biases and O2; and interleaved rotary positions on a half of each head, grouped queries."""

Bases = dict[str, dict[str, Any]]


def build_all(names: list[str], folder: str, tokenizer: str, local_names: bool) -> Bases:
    """NeMo's checkpoints of these examples: name -> path and what NeMo computes."""
    found = {}
    for name in names:
        path, cfg = f"{folder}/{name}.nemo", nemo_confs.shrunk(name, tokenizer)
        found[name] = dict(path=path, **nemo_confs.build(name, cfg, path, local_names))
    return found


def outcome(work: Callable[..., Any], *args: Any) -> Any:
    """What it returns; or of an error meant for users: key -> remedy."""
    from nemo_ee.errors import ConfigError

    try:
        return work(*args)
    except ConfigError as error:
        return {fault.key: fault.remedy for fault in error.faults}


def script(name: str, base: dict[str, Any], text: dict, words: list[str]) -> Any:
    """A training script's configuration, as `EarlyExitTrainerBuilder` leaves it."""
    prefix = f"{{train:{text['train']},validation:{text['validation']},test:null}}"
    given = [
        f"model.restore_from_path={base['path']}",
        f"model.data.data_prefix={prefix}",
        "model.early_exit.layers=[2]",
        "trainer.precision=32",
    ]
    with initialize_config_dir(CONF, version_base=None):
        cfg = compose(name, overrides=[*given, *words])
    if "tokenizer" in cfg.model:
        cfg.model.tokenizer.type = None  # comes along
    OmegaConf.resolve(cfg)
    return cfg


def gap(model: Any, base: dict[str, Any]) -> float:
    """Largest difference of the backbone's logits from NeMo's."""
    gpt = model.gpt.eval()
    return (nemo_confs.logits_of(gpt, list(nemo_confs.PROMPT)) - base["logits"]).abs().max().item()


def tune(base: dict[str, Any], text: dict, out: str, words: list[str]) -> dict[str, Any]:
    from nemo_ee.models.megatron_gpt_ee_tuning_model import MegatronGPTEETuningModel

    small = ["model.data.seq_length=16", "model.early_exit.head.shortlist_size=120"]
    small += ["model.early_exit.ridge.tokens=400", "model.validate_at_start=false"]
    cfg = script("megatron_gpt_ee_tuning", base, text, [*small, *words])
    trainer = tuning_trainer(Layout(), 2, limit_val_batches=1)
    model = MegatronGPTEETuningModel.restore_base(cfg, trainer)
    found = dict(gap=gap(model, base))
    trainer.fit(model)
    model.save_to(out)
    return found | dict(loss=float(trainer.logged_metrics["val_loss"]))


def pretrain(base: dict[str, Any], text: dict, words: list[str]) -> dict[str, Any]:
    from nemo_ee.checkpoint import run_keys
    from nemo_ee.models.megatron_gpt_ee_pretraining_model import MegatronGPTEEPretrainingModel

    on_command_line = frozenset(word.lstrip("+").removeprefix("model.").split("=")[0] for word in words)
    run_keys.command_line_keys = lambda: on_command_line  # Hydra's; of this test's process alone
    small = ["model.early_exit.init=copy", "model.global_batch_size=4"]
    cfg = script("megatron_gpt_ee_pretraining", base, text, [*small, *words])
    trainer = tuning_trainer(Layout(), 2, limit_val_batches=1)
    model = MegatronGPTEEPretrainingModel.start(cfg, trainer)
    found = dict(gap=gap(model, base))
    model.train()
    trainer.fit(model)
    return found | dict(loss=float(trainer.logged_metrics["val_loss"]))


def generate(path: str, base: dict[str, Any]) -> dict[str, Any]:
    from nemo_ee.running.restore import restore_model
    from tests.support.tiny_nemo import tiny_trainer

    trainer = tiny_trainer()
    model = restore_model(path, None, trainer, {"precision": trainer.precision, "megatron_amp_O2": False})
    text = model.tokenizer.ids_to_text(list(nemo_confs.PROMPT))
    lengths = dict(max_length=nemo_confs.NEW_TOKENS, min_length=nemo_confs.NEW_TOKENS)
    out = model.generate(
        [text], lengths, dict(use_greedy=True, add_BOS=False, end_strings=[]), early_exit=False
    )
    return dict(gap=gap(model, base), continuation=out["token_ids"][0][len(nemo_confs.PROMPT) :])


def edit(base: dict[str, Any], out: str) -> dict[str, Any]:
    from nemo_ee.models.exit_editor import edit_exits
    from tests.support.tiny_nemo import tiny_trainer

    head = dict(head=dict(projection="tied", norm=True, linear=False, mlp=False), init="copy")
    edit_exits(base["path"], out, [2], {}, tiny_trainer(), head)
    return generate(out, base)


def merge(base: dict[str, Any], exits: str, out: str) -> dict[str, Any]:
    from nemo_ee.checkpoint.exits import adapter

    adapter.merge(base["path"], exits, out)
    return generate(out, base)


def run_all(bases: Bases, text: dict, folder: str, stages: list[str]) -> dict[str, dict[str, Any]]:
    """Stage -> what becomes of every base in it."""
    found: dict[str, dict[str, Any]] = {stage: {} for stage in stages}
    for name, base in bases.items():
        out = f"{folder}/{name}_{{}}.nemo"
        for stage in stages:
            work = {
                "tuning": (tune, base, text, out.format("exits"), []),
                "pretraining": (pretrain, base, text, []),
                "generation": (generate, base["path"], base),
                "edit": (edit, base, out.format("edited")),
            }
            if stage != "merge":
                found[stage][name] = outcome(*work[stage])
            elif os.path.exists(out.format("exits")):
                found[stage][name] = outcome(merge, base, out.format("exits"), out.format("merged"))
    return found


def run_pasted(bases: Bases, text: dict, folder: str, words: dict[str, dict[str, list[str]]]) -> dict:
    """What becomes of training with remedies behind the command."""
    return {
        (stage, name): outcome(tune, bases[name], text, f"{folder}/pasted.nemo", given)
        if stage == "tuning"
        else outcome(pretrain, bases[name], text, given)
        for stage, of in words.items()
        for name, given in of.items()
    }


def check(found: dict[str, dict[str, Any]], bases: Bases) -> None:
    for stage, of in found.items():
        for name, result in of.items():
            if name in nemo_confs.REFUSED:
                assert result.keys() == {f"model.{key}" for key in nemo_confs.REFUSED[name]}, (
                    stage,
                    name,
                    result,
                )
                if stage not in ("tuning", "pretraining"):
                    assert not any("++" in remedy for remedy in result.values()), (stage, name, result)
                continue
            assert result.get("gap", 1.0) < LOGIT_TOLERANCE, (stage, name, result)
            assert "loss" not in result or 0 < result["loss"] < 20
            if "continuation" in result:
                assert result["continuation"] == bases[name]["continuation"], (stage, name)


def test_nemos_checkpoints_are_tuned_merged_and_generate(workers, tmp_path):
    """Two of them; all, and the other scripts, below."""
    names, text = list(QUICK), write_text(tmp_path)
    bases = workers(1).run(build_all, names, str(tmp_path), tokenizer_folder(), True)[0]
    for stage in ("tuning", "merge"):
        check(workers(1).run(run_all, bases, text, str(tmp_path), [stage])[0], bases)


@pytest.mark.slow
@pytest.mark.parametrize("local_names", [True, False], ids=["local names", "Transformer Engine's names"])
def test_every_example_of_nemos_works_or_is_refused(local_names, workers, tmp_path):
    text, names = write_text(tmp_path), list(nemo_confs.MODELS)
    bases = workers(1).run(build_all, names, str(tmp_path), tokenizer_folder(), local_names)[0]
    found = {}
    for stage in ("tuning", "merge", "pretraining", "generation", "edit"):
        found |= workers(1).run(run_all, bases, text, str(tmp_path), [stage])[0]
    check(found, bases)
    check_pasted_remedies(found, bases, text, str(tmp_path), workers)


def check_pasted_remedies(found: dict, bases: Bases, text: dict, folder: str, workers: Any) -> None:
    """Of the examples that training refuses."""
    words = {
        stage: {
            name: [word for remedy in found[stage][name].values() for word in pasted(remedy)]
            for name in nemo_confs.REFUSED
        }
        for stage in ("tuning", "pretraining")
    }
    again = {}
    for stage in words:  # NeMo has one batch size per process
        again |= workers(1).run(run_pasted, bases, text, folder, {stage: words[stage]})[0]
    for (stage, name), result in again.items():
        if name == "megatron_falcon_config":  # whose layers were replaced by plain ones here
            assert result.get("gap", 1.0) < LOGIT_TOLERANCE, (stage, result)
        else:
            left = {key: remedy for key, remedy in result.items() if not pasted(found[stage][name][key])}
            assert result == left and all(remedy.startswith("use another") for remedy in left.values())


def pasted(remedy: str) -> list[str]:
    """The override in a remedy, as a shell would hand it over."""
    return [word for word in shlex.split(remedy) if word.startswith("++")]


def test_the_reference_is_nemos_own(workers, tmp_path):
    """What is saved says `MegatronGPTModel` and has the names of its kind."""
    names = ["megatron_gpt_config"]
    for local, spelling in ((True, "input_layernorm."), (False, "self_attention.linear_qkv.layer_norm_")):
        folder = tmp_path / str(local)
        folder.mkdir()
        base = workers(1).run(build_all, names, str(folder), tokenizer_folder(), local)[0][names[0]]
        keys, target = saved_keys(base["path"], folder)
        assert any(spelling in key for key in keys) and target.endswith(".MegatronGPTModel")


def saved_keys(path: str, folder: Path) -> tuple[set[str], str]:
    from nemo_ee.checkpoint import archive
    from nemo_ee.checkpoint.torch_dist import TorchDistCheckpoint

    root = archive.extract(path, folder / "x")
    return set(TorchDistCheckpoint(root / archive.WEIGHTS_DIRECTORY).tensors), archive.read_config(
        path
    ).target


def start_with_sentencepiece(file: str) -> tuple[int, Any]:
    """Vocabulary and `tokenizer.type` of a model that begins with such a tokenizer."""
    from nemo_ee.models.megatron_gpt_ee_pretraining_model import MegatronGPTEEPretrainingModel

    words = ["model.tokenizer.library=sentencepiece", f"model.tokenizer.model={file}", "trainer.precision=32"]
    words += ["model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48"]
    words += ["model.num_attention_heads=2", "model.early_exit.layers=[1]", "model.data.data_prefix=[a]"]
    with initialize_config_dir(CONF, version_base=None):
        cfg = compose("megatron_gpt_ee_pretraining", overrides=words)
    OmegaConf.resolve(cfg)
    model = MegatronGPTEEPretrainingModel.start(cfg, tuning_trainer(Layout(), 1))
    return model.true_vocab_size, model.cfg.tokenizer.type


def test_a_tokenizer_of_one_file_needs_no_type(workers, tmp_path):
    import sentencepiece

    text = iter(["the cat sat on the mat and the dog ran after the cat"] * 20)
    prefix = str(tmp_path / "t")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=text, model_prefix=prefix, vocab_size=20)
    assert workers(1).run(start_with_sentencepiece, f"{prefix}.model")[0] == (20, None)
