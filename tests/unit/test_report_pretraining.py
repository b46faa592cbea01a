# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Comparing a pre-training run with exits to the plain one, from what both leave on disk."""

import copy
import runpy
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from omegaconf import OmegaConf
from torch.utils.tensorboard import SummaryWriter

from nemo_ee.checkpoint import archive
from nemo_ee.errors import DataError
from nemo_ee.evaluation.compare_pretraining import write_comparison
from nemo_ee.report.pretraining import compare, read_run
from nemo_ee.report.step_times import read_step_times

ROOT = Path(__file__).resolve().parents[2]
CONFIG = dict(
    num_layers=6,
    hidden_size=32,
    num_attention_heads=4,
    encoder_seq_length=128,
    global_batch_size=4,
    seed=1234,
    precision="bf16",
    tokenizer=dict(model="nemo:0123_tokenizer"),
    early_exit=dict(layers=[2, 4], training=dict(loss_weights=None)),
)
STEPS = (10, 20, 30)
FINAL = {"with_exits": (6.0, 5.0, 4.25), "plain": (6.5, 5.25, 4.5)}


def leave_run(directory: Path, losses=(6.0, 5.0, 4.25), weights=None, steps=STEPS, **changes) -> Path:
    """What a run leaves: event files, and a .nemo whose tokenizer has a name of its own."""
    writer = SummaryWriter(str(directory / "version_0"))
    for step, loss in zip(steps, losses, strict=True):
        writer.add_scalar("train_step_timing in s", 0.5 + 0.25 * (step > 10), step - 1)
        step -= 1  # Lightning's number of the step that was done last
        writer.add_scalar("val_loss/final", loss, step)
        writer.add_scalar("val_confidence/final", 0.25, step)
        for layer in (2, 4):
            writer.add_scalar(f"val_loss/exit_{layer}", loss + 1 / layer, step)
            writer.add_scalar(f"val_agreement/exit_{layer}", layer / 8, step)
            writer.add_scalar(f"val_confidence/exit_{layer}", layer / 16, step)
    writer.close()
    config = copy.deepcopy({**CONFIG, **changes})
    config["early_exit"]["training"]["loss_weights"] = weights
    config["tokenizer"]["model"] = f"nemo:{directory.name}_tokenizer"
    content = directory / "content"
    (content / "model_weights").mkdir(parents=True)
    OmegaConf.save(config, content / "model_config.yaml")
    archive.write_archive(content, directory / "checkpoints" / f"{directory.name}.nemo")
    return directory


@pytest.fixture
def runs(tmp_path):
    return (
        leave_run(tmp_path / "with_exits", FINAL["with_exits"]),
        leave_run(tmp_path / "plain", FINAL["plain"], [0, 0]),
    )


def test_runs_are_read_back(runs):
    run, plain = (read_run(directory, "run") for directory in runs)
    assert run.steps == STEPS and run.layers == (2, 4) and run.tokens_per_step == 512
    assert run.losses(None) == FINAL["with_exits"] and run.losses(4) == (6.25, 5.25, 4.5)
    assert run.last(2).agreement == 0.25 and run.step_time.median == 0.75
    assert compare(run, plain).differences == (-0.5, -0.25, -0.25)


def test_report_and_plots(runs, tmp_path):
    written = write_comparison(*runs, tmp_path / "report")
    assert [path.name for path in written] == ["final_exit.png", "exits.png", "report.md"]
    text = written[-1].read_text()
    assert "**4.250** nats per token with exits and **4.500** without: 0.250 lower with exits" in text
    assert "| 30 | 15,360 | 4.250 | 4.500 | -0.250 |" in text
    assert "| 4 | 4.500 | 90.0 | 0.500 | 0.250 | 4.750 | 0.500 |" in text
    assert "| 6 (final) | 4.250 | 70.1 | 1 | 0.250 | 4.500 | 1 |" in text
    assert "loss_weights` all 0" in text
    for path in written[:2]:
        assert np.std(imread(path)) > 0.05 and f"({path.name})" in text


def test_a_higher_loss_is_called_higher(runs, tmp_path):
    with_exits = leave_run(tmp_path / "worse", (6.0, 5.0, 4.75))
    assert "0.250 higher with exits" in write_comparison(with_exits, runs[1], tmp_path)[-1].read_text()


@pytest.mark.parametrize(
    ("weights", "changes", "words"),
    [
        (None, {}, "all 0, not None"),
        ([0, 0.5], {}, "all 0, not"),
        ([0, 0], {"seed": 1}, r"loss_weights alone, not in model.seed \(1234 and 1\)"),
        ([0, 0], {"steps": (10, 20, 40)}, "must have been validated in the same steps"),
    ],
)
def test_runs_that_do_not_compare_are_refused(runs, tmp_path, weights, changes, words):
    other = leave_run(tmp_path / "other", weights=weights, **changes)
    with pytest.raises(DataError, match=f"^plain={other}.*{words}"):
        write_comparison(runs[0], other, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_run_that_has_not_ended_is_refused(runs):
    (runs[0] / "checkpoints" / "with_exits.nemo").unlink()
    with pytest.raises(DataError, match="^with_exits=.*has 0; give the directory of a run that has ended"):
        read_run(runs[0], "with_exits")


def test_steps_of_all_runs_fit_the_minutes(runs, capsys):
    """Nine tenths of 10 minutes, at 0.75 s per step of either run."""
    main = runpy.run_path(str(ROOT / "scripts" / "quickstart/quickstart_steps.py"))["main"]
    main(str(runs[0]), "10")
    main(*map(str, runs), "10")
    main(str(runs[0]), "0")
    assert capsys.readouterr().out.split() == ["720", "360", "20"]
    with pytest.raises(SystemExit, match="error: .*no step times were logged"):
        main(str(ROOT / "conf"), "10")
    with pytest.raises(DataError):
        read_step_times(ROOT / "conf")
