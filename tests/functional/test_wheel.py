# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The wheel in an environment of its own, outside the repository: the main steps by the command nemo-ee."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from nemo_ee import __version__
from tests.support import tiny_llama
from tests.support.script import ROOT, TORCHRUN
from tests.support.wheel import build_wheel

WORDS = " ".join(tiny_llama.WORDS)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A Python with the wheel, and with what it needs out of the environment that runs the tests; and the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    wheel = build_wheel(folder)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "needed.pth").write_text("\n".join(others) + "\n")
    return python.parent, wheel


@pytest.fixture(scope="module")
def nemo_ee(environment, tmp_path_factory):
    """`nemo_ee(command, key=value…)` in an empty folder, which it must leave with status 0; returns what it said."""
    binaries, wheel = environment
    folder = tmp_path_factory.mktemp("elsewhere")
    own = {name: value for name, value in os.environ.items() if name not in {*TORCHRUN, "PYTHONPATH"}}
    own |= {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheel.parent),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }

    def run(*arguments: str, status: int = 0, launcher: Sequence[str] = ()) -> str:
        start = [binaries / "python", "-m", *launcher] if launcher else []
        command = [*start, binaries / "nemo-ee", *arguments]
        done = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    run.folder, run.environment = folder, own
    return run


@pytest.mark.slow
def test_the_main_steps(nemo_ee, environment):
    folder = nemo_ee.folder
    tiny_llama.write(folder / "hf")
    (folder / "text").mkdir()
    for number in range(40):
        (folder / "text" / f"{number}.txt").write_text(f"w{number} {WORDS} " * 8)

    package = ["--package", "nemo_ee", "--version", __version__, "--member", "*/conf/edit_early_exits.yaml"]
    assert "downloaded" in nemo_ee("fetch", *package, "--output", "fetched.yaml")
    assert "layers:" in (folder / "fetched.yaml").read_text()

    assert "wrote base.nemo" in nemo_ee("convert", "input_name_or_path=hf", "output_path=base.nemo")
    said = nemo_ee(
        "preprocess", "input=text/", "output_prefix=data/text", "tokenizer.nemo=base.nemo", "workers=1"
    )
    assert "validation: 4 documents" in said

    data = "train:[data/text_train],validation:[data/text_validation],test:null"
    tuning = [
        "model.restore_from_path=base.nemo",
        "model.early_exit.layers=[1,3]",
        "model.data.data_prefix={" + data + "}",
    ]
    tuning += ["model.data.seq_length=16", "model.early_exit.head.shortlist_size=60", "trainer.max_steps=3"]
    tuning += [
        "trainer.val_check_interval=3",
        "trainer.limit_val_batches=1",
        "model.early_exit.ridge.tokens=256",
        "exp_manager.explicit_log_dir=run",
    ]
    refused = nemo_ee("tune", *tuning, "model.early_exit.layer=3", status=1)
    assert "unknown key; did you mean model.early_exit.layers?" in refused
    nemo_ee("tune", *tuning, "trainer.devices=2", "model.pipeline_model_parallel_size=2")  # starts a process

    exits = ["gpt_model_file=base.nemo", "adapter_file=run/checkpoints/megatron_gpt_ee_tuning.nemo"]
    asked = ["prompts=[the cat sat]", "inference.tokens_to_generate=5", "early_exit.threshold=0.1"]
    assert "(5 tokens:" in nemo_ee("generate", *exits, *asked)
    torchrun = ["torch.distributed.run", "--nproc-per-node=2", "--no-python"]
    two = ["trainer.devices=2", "tensor_model_parallel_size=2"]
    assert nemo_ee("generate", *exits, *asked, *two, launcher=torchrun).count("(5 tokens:") == 1

    assert "wrote merged.nemo" in nemo_ee("merge", *exits, "output_path=merged.nemo")
    report = [
        "data.prefix=data/text_validation",
        "data.seq_length=16",
        "data.sequences=4",
        "output_dir=report",
    ]
    report += [
        f"generation.{each}"
        for each in ("num_prompts=2", "timed_prompts=1", "repeats=1", "tokens_to_generate=4")
    ]
    nemo_ee("evaluate", "gpt_model_file=merged.nemo", *report)
    page = (folder / "report" / "report.md").read_text()
    assert "nemo-ee evaluate gpt_model_file=merged.nemo" in page and f"release {__version__}" in page

    imports = [environment[0] / "python", ROOT / "scripts" / "requirements" / "check_imports.py"]
    done = subprocess.run(
        imports, cwd=folder, env=nemo_ee.environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "every module of nemo_ee can be imported" in done.stdout, done.stderr
