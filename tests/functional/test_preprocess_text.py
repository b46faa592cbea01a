# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""scripts/preprocess_text.py as a user runs it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.script import start_script
from tests.support.tiny_tokenizer import save_tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    directory = tmp_path_factory.mktemp("workspace")
    save_tiny_tokenizer(directory / "tokenizer")
    articles = {f"Article {number}": {"extract": f"the cat {number} sat"} for number in range(20)}
    (directory / "articles.json").write_text(json.dumps(articles))
    return directory


def run(workspace, *overrides):
    command = [sys.executable, str(ROOT / "scripts" / "preprocess_text.py"), *overrides]
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        command, cwd=workspace, env=environment, capture_output=True, text=True, timeout=120
    )


def test_writes_splits_and_nothing_else(workspace):
    result = run(
        workspace,
        "input=articles.json",
        "json_key=extract",
        "output_prefix=out/wiki",
        "tokenizer.type=tokenizer",
    )
    assert result.returncode == 0, result.stderr
    assert "train: 18 documents" in result.stdout and "validation: 2 documents" in result.stdout
    assert "tokenizing: 100%" in result.stderr
    assert sorted(path.name for path in workspace.iterdir()) == ["articles.json", "out", "tokenizer"]
    assert json.loads((workspace / "out" / "wiki.json").read_text())["documents"] == 20


def test_errors_are_one_message_and_a_nonzero_status(workspace):
    result = run(
        workspace, "input=missing.txt", "output_prefix=new/wiki", "tokenizer.type=tokenizer", "document=page"
    )
    assert result.returncode == 1
    assert "error: document=page: not one of file, line, paragraph" in result.stderr
    assert "Traceback" not in result.stderr
    result = run(workspace, "input=missing.txt", "output_prefix=new/wiki", "tokenizer.type=tokenizer")
    assert result.returncode == 1 and "error: input=missing.txt: must exist" in result.stderr
    assert not (workspace / "new").exists()


def start(workspace, *overrides):
    command = ["preprocess_text.py", "json_key=extract", "tokenizer.type=tokenizer", "workers=1", *overrides]
    return start_script(workspace, *command)


@pytest.mark.slow
def test_of_two_runs_at_one_output_one_ends_with_an_error(workspace):
    (workspace / "many.jsonl").write_text(
        "".join(f'"the cat {number} sat on the mat"\n' for number in range(60_000))
    )
    runs = [start(workspace, "input=many.jsonl", "output_prefix=both/wiki") for _ in range(2)]
    said = [run.communicate(timeout=120)[0] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 1], said
    (refused,) = (text for run, text in zip(runs, said, strict=True) if run.returncode)
    assert "error: both/wiki.json: process " in refused and "Traceback" not in refused
    names = sorted(path.name for path in (workspace / "both").iterdir())
    assert names == [
        "wiki.json",
        *(f"wiki_{name}.{end}" for name in ("train", "validation") for end in ("bin", "idx")),
    ]


@pytest.mark.slow
def test_runs_that_are_killed_leave_the_old_dataset_and_the_next_one_clears_the_rest(workspace):
    (workspace / "many.jsonl").write_text(
        "".join(f'"the cat {number} sat on the mat"\n' for number in range(60_000))
    )
    given = ("input=many.jsonl", "output_prefix=killed/wiki", "overwrite=true")
    assert start(workspace, *given).wait(timeout=120) == 0
    folder = workspace / "killed"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    left = 0
    for wait in range(8):
        run = start(workspace, *given)
        while not any(".nemo_ee-part" in path.name for path in folder.iterdir()) and run.poll() is None:
            time.sleep(0.02)
        time.sleep(0.3 * wait)
        run.kill()
        run.wait()
        left += len(list(folder.iterdir())) > len(before)
        assert {name: (folder / name).read_bytes() for name in before} == before
    assert left > 2, "it was killed too late to leave anything"
    assert start(workspace, *given).wait(timeout=120) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
