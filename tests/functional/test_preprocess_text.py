# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""scripts/preprocess_text.py as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert "error: document=page: must be one of file, line, paragraph" in result.stderr
    assert "Traceback" not in result.stderr
    result = run(workspace, "input=missing.txt", "output_prefix=new/wiki", "tokenizer.type=tokenizer")
    assert result.returncode == 1 and "error: input=missing.txt: must exist" in result.stderr
    assert not (workspace / "new").exists()
