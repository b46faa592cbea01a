# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""scripts/slurm/*.sub with SLURM's variables, and `tests.support.srun` for srun: what they start, and the job's end."""

import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo_ee.runtime.children import STOPPING
from tests.distributed.test_launchers import LAUNCHERS, SLURM, job_and_port
from tests.functional import test_generate_script, test_pretraining_script, test_tuning_script
from tests.support.script import ROOT
from tests.support.tiny_gpt import tokenizer_folder
from tests.support.tuning import write_text

FOLDER = ROOT / "scripts" / "slurm"
WRITTEN = {"tuning": "megatron_gpt_ee_tuning.nemo", "pretraining": "megatron_gpt_ee.nemo", "generate": None}
"""The scripts, and what a training run leaves when it has come to its end."""


class Cluster:
    """A job of two tasks on one node; `calls` is what it asked SLURM for."""

    def __init__(self, folder: Path):
        self.folder, self.run = folder, folder / "run"
        bin = folder / "bin"
        bin.mkdir()
        for name, text in {
            "srun": f'exec {shlex.quote(sys.executable)} {ROOT}/tests/support/srun.py "$@"',
            "scontrol": 'echo "scontrol $*" >>"$CALLS"',
            "python": f'exec {shlex.quote(sys.executable)} "$@"',
        }.items():
            (bin / name).write_text(f"#!/bin/bash\n{text}\n")
            (bin / name).chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
        self.environment = {
            **kept,
            **SLURM,
            "PATH": f"{bin}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "NEMO_EE": str(ROOT),
            "RUN": str(self.run),
            "CALLS": str(folder / "calls"),
        }

    def sbatch(self, name: str, *overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs the script as SLURM does on the job's first node."""
        job = {"SLURM_JOB_ID": job_and_port()[0], "SLURM_JOB_NAME": f"nemo_ee_{name}"}
        (self.folder / "calls").write_text("")
        return subprocess.run(
            ["bash", FOLDER / f"{name}.sub", *overrides],
            cwd=self.folder,
            env={**self.environment, **job, **variables},
            capture_output=True,
            text=True,
            timeout=500,
        )

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    @property
    def requeued(self) -> bool:
        return self.calls[-1].startswith("scontrol requeue 7")


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    return Cluster(tmp_path)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="PyPI has shellcheck for x86_64 only")
def test_shell_scripts_follow_the_rules_of_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "comes with scripts/requirements/requirements.txt"
    scripts = [*ROOT.glob("scripts/*.sh"), *FOLDER.glob("*.sub"), *ROOT.glob(".ci/*")]
    assert {path.stem for path in scripts} > {*WRITTEN, "env", "test", "quickstart"}
    done = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", WRITTEN)
def test_directives(name):
    """The job's signal is one that training stops for; what it asks for is a task per GPU."""
    text = (FOLDER / f"{name}.sub").read_text()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", text, re.M))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    head = text.partition("\nset -euo pipefail\n")[0]
    assert len(asked) == head.count("#SBATCH"), "SLURM reads no directive behind the first command"
    if WRITTEN[name]:
        word, _, seconds = asked["signal"].partition("@")
        assert getattr(signal, f"SIG{word}") in STOPPING and int(seconds) >= 120
        assert asked["requeue"] == "" and asked["open-mode"] == "append"
        config = OmegaConf.load(ROOT / "conf" / f"megatron_gpt_ee_{name}.yaml")
        assert config.exp_manager.create_preemption_callback and config.exp_manager.resume_if_exists
        assert f"$RUN/checkpoints/{config.name}.nemo" in text and WRITTEN[name] == f"{config.name}.nemo"
    else:
        assert "signal" not in asked and "scontrol" not in text


@pytest.mark.parametrize("name", WRITTEN)
def test_tasks_run_the_script_in_the_container_with_keys_that_exist(name, cluster):
    done = cluster.sbatch(name, "seed=5" if name == "generate" else "model.seed=5", TENSOR="1", PIPELINE="2")
    assert done.returncode == 0, done.stderr
    calls = cluster.calls[: cluster.calls.index("python")]
    assert calls == [
        "srun",
        "--kill-on-bad-exit=1",
        "--no-container-mount-home",
        "--container-image=/shared/nemo_ee.sqsh",
        "--container-mounts=/shared:/shared",
    ]
    command = [line for line in cluster.calls[len(calls) :] if not line.startswith("scontrol")]
    assert command[:2] == ["python", f"{ROOT}/scripts/megatron_gpt_ee_{name}.py"]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = compose(f"megatron_gpt_ee_{name}", overrides=command[2:])
    assert (config.trainer.devices, config.trainer.num_nodes) == (2, 1)
    model = config if name == "generate" else config.model
    assert model.seed == 5 and model.pipeline_model_parallel_size == 2
    if name != "generate":
        assert model.global_batch_size % model.micro_batch_size == 0
        assert model.data.data_prefix.train == ["/shared/data/mine_train"]


@pytest.mark.parametrize("name", [name for name, written in WRITTEN.items() if written])
def test_a_job_is_queued_again_until_its_run_has_come_to_an_end(name, cluster):
    assert cluster.sbatch(name).returncode == 0 and cluster.requeued, "stopped, with a checkpoint"
    (cluster.run / "checkpoints").mkdir(parents=True)
    (cluster.run / "checkpoints" / WRITTEN[name]).touch()
    assert cluster.sbatch(name).returncode == 0 and not cluster.requeued
    (cluster.run / "checkpoints" / WRITTEN[name]).unlink()
    failed = cluster.sbatch(name, "model.no_such_key=1", RUN_TASKS="1")
    assert failed.returncode == 1 and not cluster.requeued, "an error would come again, for ever"
    assert "no_such_key" in failed.stderr


tuned, generated = test_tuning_script.workspace, test_generate_script.workspace
"""Fixtures: checkpoints and text."""


@pytest.mark.slow
def test_tuning_is_stopped_by_a_signal_and_goes_on(tuned, cluster):
    given = dict(
        MODEL=f"{tuned}/base.nemo", DATA=str(tuned / "none"), LAYERS="[1,3]", TENSOR="2", RUN_TASKS="1"
    )
    changes = dict(
        exp_manager__explicit_log_dir=None, model__restore_from_path=None, model__early_exit__layers=None
    )
    small = test_tuning_script.arguments(tuned, trainer__max_steps="400", **changes)
    stopped = cluster.sbatch("tuning", *small, **given, SIGNAL_AFTER=f"{cluster.run}/checkpoints/*-last")
    assert stopped.returncode == 0 and cluster.requeued, stopped.stderr[-3000:]
    (last,) = cluster.run.glob("checkpoints/*-last")
    done = int(re.search(r"-step=(\d+)", last.name)[1])
    assert 2 <= done < 400 and "SIGTERM was received" in stopped.stdout + stopped.stderr
    small[small.index("trainer.max_steps=400")] = f"trainer.max_steps={done + 2}"
    finished = cluster.sbatch("tuning", *small, **given)
    assert finished.returncode == 0 and not cluster.requeued, finished.stderr[-3000:]
    assert (cluster.run / "checkpoints" / WRITTEN["tuning"]).exists()


@pytest.mark.slow
def test_pretraining_on_two_stages(cluster, tmp_path):
    text = write_text(tmp_path)
    small = test_pretraining_script.arguments(text, 2, cluster.run)
    own = ("model.pipeline", "model.early_exit", "model.tokenizer", "trainer.devices", "exp_manager")
    small = [argument for argument in small if not argument.startswith(own)]
    given = dict(TOKENIZER=tokenizer_folder(), LAYERS="[2]", BATCH="8", RUN_TASKS="1")
    done = cluster.sbatch("pretraining", *small, **given)
    assert done.returncode == 0 and not cluster.requeued, done.stderr[-3000:]
    assert (cluster.run / "checkpoints" / WRITTEN["pretraining"]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["1", "2"])
def test_generation_over_tensors_and_stages(pipeline, generated, cluster):
    directory, expected = generated
    prompts, output = cluster.folder / "prompts.txt", cluster.folder / "texts.jsonl"
    prompts.write_text("\n".join(test_generate_script.PROMPTS) + "\n")
    given = dict(
        MODEL=f"{directory}/base.nemo",
        EXITS=f"{directory}/exits.nemo",
        PROMPTS=str(prompts),
        OUTPUT=str(output),
    )
    exact = ["trainer.precision=32", "megatron_amp_O2=false", *test_generate_script.ARGUMENTS]
    done = cluster.sbatch("generate", *exact, **given, PIPELINE=pipeline, RUN_TASKS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    off = 1e-4 if pipeline == "2" else 0.05  # see test_generate_script.test_two_processes
    test_generate_script.expect(test_generate_script.read(output), expected, off)
