# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""scripts/evaluate_early_exit.py and the benchmarks as a user runs them, on a tiny base with exits."""

import json
import os
from types import SimpleNamespace

import pytest

from tests.support.fake_report import read_report
from tests.support.script import ROOT, run_script

HEAD = dict(mlp=True, linear=True, projection="shortlist", shortlist_size=100)
SMALL = [
    "data.sequences=6",
    "data.seq_length=24",
    "generation.num_prompts=3",
    "generation.prompt_tokens=8",
    "generation.tokens_to_generate=10",
    "generation.timed_prompts=1",
    "generation.repeats=2",
    "generation.thresholds=[0.3,0.7,1.0]",
]
RECIPE = [
    "model.data.seq_length=24",
    "model.early_exit.head.shortlist_size=100",
    "model.early_exit.ridge.tokens=96",
    "trainer.precision=32",
]


def write_inputs(directory):
    """A base, exits for it, the two merged, and text; in a process of their own."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from nemo_ee.checkpoint.exits.adapter import merge
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel as Model
    from tests.support.tiny_gpt import VOCABULARY, fill, tiny_model, tiny_model_config, tiny_trainer

    config = tiny_model_config(head=HEAD)
    early_exit = config.pop("early_exit")
    base = f"{directory}/base.nemo"
    tiny_model(config).save_to(base)
    with_exits = Model.add_exits(
        Model.restore_from(base, return_config=True, trainer=tiny_trainer()), early_exit
    )
    model = Model.restore_from(base, override_config_path=with_exits, trainer=tiny_trainer())
    fill(model)
    model.save_adapters(f"{directory}/exits.nemo")
    merge(base, f"{directory}/exits.nemo", f"{directory}/merged.nemo")
    for name, seed in (("train", 0), ("validation", 1)):
        builder = IndexedDatasetBuilder(f"{directory}/{name}.bin", dtype=np.uint16)
        for row in np.random.default_rng(seed).integers(6, VOCABULARY, (12, 60)):
            builder.add_document(row, [len(row)])
        builder.finalize(f"{directory}/{name}.idx")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, workers):
    directory = tmp_path_factory.mktemp("evaluate")
    workers(1).run(write_inputs, str(directory))
    return directory


def evaluate_twice(directory, overrides):
    """The script's own steps in this rank, with base and adapter and with the merged file."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from nemo_ee.evaluation.evaluate import evaluate
    from nemo_ee.evaluation.settings import EvaluationConfig
    from nemo_ee.models.runs.trainer_builder import EarlyExitTrainerBuilder

    os.chdir(directory)
    for more in (
        ["gpt_model_file=base.nemo", "adapter_file=exits.nemo", "output_dir=two"],
        ["gpt_model_file=merged.nemo", "output_dir=one"],
    ):
        with initialize_config_dir(str(ROOT / "conf"), version_base=None):
            composed = compose("evaluate_early_exit", ["data.prefix=validation", *overrides, *more])
        values = OmegaConf.to_container(composed, resolve=True)
        trainer = values.pop("trainer")
        config = EvaluationConfig.from_dict({**values, "precision": trainer["precision"]})
        settings = OmegaConf.create({"trainer": trainer, "model": {"precision": trainer["precision"]}})
        evaluate(config, EarlyExitTrainerBuilder(settings).create_trainer())


def test_merged_model_gives_the_same_report(workspace, workers):
    workers(1).run(evaluate_twice, str(workspace), [*SMALL, "generation.sample_threshold=0.3"])
    two, one = (read_report(workspace / name / "report.json") for name in ("two", "one"))
    assert two.metadata.adapter == "exits.nemo" and one.metadata.adapter is None
    assert two.exits == one.exits and two.final_loss == one.final_loss and two.samples == one.samples
    for mine, other in zip(two.thresholds, one.thresholds, strict=True):
        assert mine.share_per_exit == other.share_per_exit and mine.perplexity == other.perplexity
        assert mine.agreement == other.agreement
    assert [exit_.layer for exit_ in two.exits] == [2, 4, 6] and two.exits[0].tokens == 6 * 24
    shares = [result.share_per_exit[8] for result in two.thresholds]
    assert shares == sorted(shares) and shares[0] < 1.0 == shares[-1]
    assert two.thresholds[-1].agreement == 1.0
    assert two.thresholds[-1].perplexity == two.thresholds[-1].full_depth_perplexity


def test_texts_and_chats_are_different_prompts(workspace, workers):
    (workspace / "one.txt").write_text("w1 w2\n")
    found = {}
    for name, prompts in {
        "chat": "chat_prompts_file=one.txt",
        "in_words": 'prompts=["user w1 w2 <eos> assistant"]',
        "text": "prompts=[w1 w2]",
    }.items():
        overrides = [*SMALL, f"generation.{prompts}", "generation.sample_threshold=0.3"]
        workers(1).run(evaluate_twice, str(workspace), overrides)
        found[name] = read_report(workspace / "one" / "report.json")
    assert found["chat"].samples[0].tokens == found["in_words"].samples[0].tokens
    assert found["chat"].samples[0].tokens != found["text"].samples[0].tokens
    assert found["text"].prompts == "1 texts that were given"


def test_script_writes_the_report(workspace):
    lines = [{"prompt": "w1 w2 w3"}, {"messages": [{"role": "user", "content": "w9"}]}]
    (workspace / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run_script(
        workspace,
        "evaluate_early_exit.py",
        "gpt_model_file=base.nemo",
        "adapter_file=exits.nemo",
        "data.prefix=validation",
        "generation.chat_prompts_file=chats.jsonl",
        "output_dir=report",
        *SMALL,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "held-out text" in done.stderr and "generation: 100%" in done.stderr
    names = {path.name for path in (workspace / "report").iterdir()}
    assert {"report.json", "report.md", "per_exit_loss.png", "speed_vs_agreement.png"} <= names
    report = read_report(workspace / "report" / "report.json")
    assert report.prompts == "2 prompts of chats.jsonl, in the chat template"
    assert [sample.prompt for sample in report.samples] == ["w1 w2 w3", "w9"]
    assert [exit_.layer for exit_ in report.exits_on_own_text] == [2, 4, 6]
    page = (workspace / "report" / "report.md").read_text()
    assert "Greedy texts after 2 prompts of chats.jsonl" in page and "full depth's texts at one exit" in page
    assert str(workspace) not in (workspace / "report" / "report.json").read_text()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapter_file=null"], "base.nemo: has no exits to evaluate; set adapter_file"),
        (["generation.exits=[3]"], "generation.exits=[3]: not all of the model's exits [2, 4, 6]"),
        (["data.seq_length=65"], "data.seq_length=65: exceeds the model's encoder_seq_length=64"),
        (["generation.prompt_tokens=60"], "generation.prompt_tokens=60"),
        (["data.prefix=missing"], "data.prefix=missing: missing.bin does not exist"),
        (["tuning_log_dir=missing"], "tuning_log_dir=missing: must hold TensorBoard event files"),
    ],
)
def test_faults_are_found_before_the_model_is_built(workspace, monkeypatch, overrides, words):
    from nemo_ee.errors import CheckpointError, ConfigError, DataError
    from nemo_ee.evaluation.evaluate import evaluate
    from nemo_ee.evaluation.settings import EvaluationConfig

    monkeypatch.chdir(workspace)
    values = {
        "gpt_model_file": "base.nemo",
        "adapter_file": "exits.nemo",
        "data": {"prefix": "validation", "seq_length": 24},
        "generation": {"prompt_tokens": 8, "tokens_to_generate": 8},
        "output_dir": "refused",
    }
    for override in overrides:
        key, value = override.split("=")
        section, _, name = key.rpartition(".")
        target = values[section] if section else values
        target[name] = None if value == "null" else json.loads(value) if value[0] in "[0123456789" else value
    with pytest.raises((CheckpointError, ConfigError, DataError)) as error:
        evaluate(EvaluationConfig.from_dict(values), trainer=None)
    assert words in str(error.value)


def test_it_runs_in_one_process(workspace, monkeypatch):
    from nemo_ee.errors import ConfigError
    from nemo_ee.evaluation.evaluate import evaluate
    from nemo_ee.evaluation.settings import EvaluationConfig

    monkeypatch.chdir(workspace)
    values = {"gpt_model_file": "base.nemo", "adapter_file": "exits.nemo"}
    text = {"data": {"prefix": "validation", "seq_length": 24}}
    trainer = SimpleNamespace(world_size=2, num_devices=2, num_nodes=1)
    short = {"generation": {"prompt_tokens": 8, "tokens_to_generate": 8}}
    with pytest.raises(ConfigError, match="trainer.devices=2: .* runs in one process; set both to 1"):
        evaluate(EvaluationConfig.from_dict({**values, **text, **short}), trainer)
    assert not (workspace / "refused").exists()


def test_recipes_benchmark(workspace):
    recipe = "objective: CE, confidence-weighted"
    arguments = ["--model", "base.nemo", "--train", "train", "--validation", "validation", "--only", recipe]
    arguments += [
        "--layers",
        "2,4",
        "--sequences",
        "8",
        "--output",
        "recipes",
        "--set",
        *RECIPE,
        "trainer.max_steps=2",
    ]
    done = run_script(workspace, "benchmarks/exit_recipes.py", *arguments, "model.optim.sched.warmup_steps=1")
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = [
        json.loads(line) for line in (workspace / "recipes/exit_recipes.jsonl").read_text().splitlines()
    ]
    assert row["case"] == {"recipe": recipe}
    assert row["about case"]["fitted"] == 96 and row["about case"]["held_out"] == 8 * 24
    found = row["ways"][""]
    assert all(
        f"exit {n}, {what}" in found for n in (2, 4) for what in ("no steps", "tuned", "strict", "loss")
    )
    page = (workspace / "recipes/exit_recipes.md").read_text()
    assert f"| {recipe} |" in page and str(workspace) not in page


def test_tuning_step_benchmark(workspace):
    arguments = [
        "--model",
        "base.nemo",
        "--text",
        "train",
        "--layers",
        "2,4",
        "--steps",
        "2",
        "--output",
        "step",
    ]
    done = run_script(workspace, "benchmarks/tuning_step.py", *arguments, "--set", *RECIPE)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (workspace / "step/tuning_step.jsonl").read_text().splitlines()]
    assert [row["ways"][""]["layers"] for row in rows] == [4, 8, 8]
    assert all(len(row["ways"][""]["step / parts"]) == 2 for row in rows)
    page = (workspace / "step/tuning_step.md").read_text()
    assert "| CE, backbone up to the last exit | 4 |" in page and str(workspace) not in page
