# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Exported folders in environments of their own, with other versions of transformers and without this package."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import other_transformers, remote_folder
from tests.support.remote_folder import DEPTH, EXITS, PROMPT, STEPS

VERSIONS = {
    "oldest": "transformers==4.51.3",
    "newest 4": "transformers>=4.57,<5",
    "newest 5": "transformers>=5.24,<6",
}
DRAFTS = [1, 6]
"""One exit that a plain Llama computes, and one whose translator is folded into an MLP."""


def write(folder):
    said = remote_folder.write_all(folder)["llama"]
    for layer in DRAFTS:
        remote_folder.export(folder, "llama", "draft", layer=layer)
    return said


def pip(python, *arguments):
    """Installs packages; where there is no network, the test is skipped."""
    index = os.environ.get("NEMO_EE_TORCH_INDEX")
    command = [python, "-m", "pip", "install", "-q", "--no-compile", *arguments]
    command += ["--extra-index-url", index] if index else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{' '.join(arguments)} cannot be installed: {done.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A Python with torch alone."""
    home = tmp_path_factory.mktemp("torch")
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    pip(str(home / "bin" / "python"), "torch==" + importlib.metadata.version("torch").partition("+")[0])
    return str(home / "bin" / "python")


@pytest.fixture(scope="module")
def folder(workers, tmp_path_factory):
    """What is exported, what is asked of it, and what the model says itself."""
    folder = tmp_path_factory.mktemp("exported")
    (said,) = workers(1).run(write, str(folder))
    asked = {
        "prompt": PROMPT,
        "words": "w1 w2 w3",
        "steps": STEPS,
        "drafts": DRAFTS,
        "exits": EXITS,
        "early_exit": said.thresholds["each"],
    }
    (folder / "asked.json").write_text(json.dumps(asked))
    return folder, said


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_folders_give_our_texts(python, folder, tmp_path, version):
    home, said = folder
    pip(python, "--target", str(tmp_path / "packages"), VERSIONS[version])
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PYTHONPATH": str(tmp_path / "packages"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [python, str(Path(other_transformers.__file__)), str(home)]
    how = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True)  # a question would not be answered
    done = subprocess.run(command, cwd=tmp_path, env=environment, timeout=900, **how)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(version, "is", found["version"])
    full, left = said.texts["full"][0], said.texts["each"]
    assert found["base"] == found["remote"] == full
    assert found["ids"] == [7, 8, 9]
    assert found["drafts"] == {str(n): full for n in DRAFTS}
    assert found["exits"] == {str(n): full for n in EXITS}
    assert found["left"] == [*left] and set(left[1]) == {*EXITS, DEPTH}
    assert version == "oldest" or found["custom"] == left[0]
