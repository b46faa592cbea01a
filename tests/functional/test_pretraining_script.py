# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""scripts/megatron_gpt_ee_pretraining.py as a user runs it on several stages, killed and started again."""

import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from nemo_ee.checkpoint import archive
from nemo_ee.checkpoint.torch_dist import TorchDistCheckpoint
from tests.support.script import run_script, start_script
from tests.support.tiny_gpt import tokenizer_folder
from tests.support.tuning import write_text

SCRIPT, NAME = "megatron_gpt_ee_pretraining.py", "megatron_gpt_ee.nemo"
MARK = "*-unfinished"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def arguments(text: dict, stages: int, run: Path) -> list[str]:
    """The script's own YAML, made small: two layers a stage, an exit behind each stage but the last."""
    exits = ",".join(str(2 * stage) for stage in range(1, stages))
    return [
        f"model.data.data_prefix={{train:{text['train']},validation:{text['validation']},test:null}}",
        f"model.tokenizer.type={tokenizer_folder()}",
        f"model.early_exit.layers=[{exits}]",
        f"model.pipeline_model_parallel_size={stages}",
        f"trainer.devices={stages}",
        f"model.num_layers={2 * stages}",
        "model.encoder_seq_length=16",
        "model.hidden_size=64",
        "model.ffn_hidden_size=96",
        "model.num_attention_heads=4",
        "trainer.max_steps=6",
        "trainer.val_check_interval=2",
        "trainer.limit_val_batches=1",
        "trainer.log_every_n_steps=1",
        "model.optim.sched.warmup_steps=2",
        f"exp_manager.explicit_log_dir={run}",
    ]


def weights(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = TorchDistCheckpoint(archive.extract(path, f"{path}.content") / archive.WEIGHTS_DIRECTORY)
    return {key: checkpoint.read(key) for key in checkpoint.tensors}


def kill_while_it_writes(process, run: Path, rank: int) -> list[psutil.Process]:
    """SIGKILL to one rank while a checkpoint is written that is not the first, by helpers of its ranks; all processes
    of the run then."""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        written = {path.name for path in run.rglob("*.ckpt")} | {path.name for path in run.rglob("*step=2*")}
        marks = [mark for mark in run.rglob(MARK) if "step=2" not in mark.name and "-last" not in mark.name]
        if written and marks:
            main = psutil.Process(process.pid)
            ranks, started = main.children(), main.children(recursive=True)
            if len(started) == len(ranks):
                continue
            (victim,) = (c for c in ranks if c.environ().get("LOCAL_RANK") == str(rank))
            victim.kill()
            return started
        time.sleep(0.001)
    raise AssertionError("no second checkpoint was begun")


@pytest.mark.slow
@pytest.mark.parametrize("stages", [2, 3])
def test_a_signal_to_the_whole_group_ends_the_run_with_a_checkpoint(stages, text, tmp_path):
    run = tmp_path / "run"
    more = ["trainer.max_steps=400", "model.data.num_workers=2", "trainer.val_check_interval=50"]
    by_step = "exp_manager.checkpoint_callback_params.every_n_train_steps=3"
    process = start_script(tmp_path, SCRIPT, *arguments(text, stages, run), *more, by_step)
    deadline = time.monotonic() + 300
    while not list(run.rglob("*-last")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)  # what writes and what reads gets it, too
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output[-3000:]
    (step,) = re.findall(r"the run ends after step (\d+), with a checkpoint", output)
    (last,) = run.rglob("*-last")
    assert f"-step={step}-" in last.name and not list(run.rglob(MARK)) and "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("stages", [3, 4])
def test_a_rank_that_is_killed_while_it_writes_costs_the_steps_since_the_last_checkpoint(
    stages, text, tmp_path
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run_script(tmp_path, SCRIPT, *arguments(text, stages, whole))
    assert done.returncode == 0, done.stderr[-3000:]

    process = start_script(tmp_path, SCRIPT, *arguments(text, stages, killed))
    started = kill_while_it_writes(process, killed, rank=1)
    output, _ = process.communicate(timeout=120)
    assert not psutil.wait_procs(started, timeout=10)[1], "nothing stays behind"
    assert process.returncode != 0 and "error: rank 1 (" in output, output[-3000:]
    assert not list(killed.rglob(NAME))

    again = run_script(tmp_path, SCRIPT, *arguments(text, stages, killed))
    assert again.returncode == 0, again.stderr[-3000:]
    assert not list(killed.rglob(MARK))
    (expected,), (found,) = whole.rglob(NAME), killed.rglob(NAME)
    expected, found = weights(expected), weights(found)
    assert found.keys() == expected.keys() and any(".exits." in f".{key}" for key in found)
    for key, value in expected.items():
        assert found[key].equal(value), key
