# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The command nemo-ee, in the repository and out of a wheel: every script is one, with its YAML."""

import os
import subprocess
import sys
import zipfile

import pytest

from nemo_ee import __version__
from nemo_ee.runtime import commands
from tests.support.script import ROOT
from tests.support.wheel import build_wheel

HEAVY = "{'torch', 'nemo', 'megatron', 'lightning', 'transformers', 'hydra'}"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A directory with what the wheel holds, as an installation has it."""
    directory = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(build_wheel(directory)) as archive:
        archive.extractall(directory / "site")
    return directory / "site"


def run(*arguments, path=ROOT, cwd=None):
    """`nemo-ee arguments…` of the package in a directory."""
    command = [sys.executable, "-m", "nemo_ee.runtime.commands", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_every_script_is_a_command():
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    assert set(commands.COMMANDS.values()) == scripts
    assert len(commands.COMMANDS) == len(scripts), "one command each"


def test_a_wheel_holds_every_script_and_yaml(installed):
    for folder, ending in (("scripts", "*.py"), ("conf", "*.yaml")):
        source = {path.name: path.read_bytes() for path in (ROOT / folder).glob(ending)}
        packed = {path.name: path.read_bytes() for path in (installed / "nemo_ee" / folder).iterdir()}
        assert packed == source, folder
    package = [
        path for path in (ROOT / "nemo_ee").rglob("*") if path.is_file() and path.parent.name != "__pycache__"
    ]
    assert [path for path in package if not (installed / path.relative_to(ROOT)).exists()] == []
    (entries,) = installed.glob("nemo_ee-*.dist-info/entry_points.txt")
    assert entries.read_text().splitlines() == [
        "[console_scripts]",
        "nemo-ee = nemo_ee.runtime.commands:main",
    ]
    assert entries.parent.name == f"nemo_ee-{__version__}.dist-info"


def test_help_has_a_line_for_every_command_and_loads_nothing():
    done = run("--help")
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    assert [*lines] == [*commands.COMMANDS] and all(line.endswith(".") for line in lines.values())
    assert "EE-Tuning" in lines["tune"] and str(ROOT / "conf") in done.stdout
    assert run().stdout == done.stdout
    code = f"import nemo_ee.runtime.commands, sys; print(*sorted({HEAVY} & sys.modules.keys()))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert loaded.stdout.split() == []


def test_version():
    assert run("--version").stdout == f"nemo_ee {__version__}\n"


@pytest.mark.parametrize(
    ("given", "said"), [("tunes", "did you mean tune?"), ("xyz", "nemo-ee --help lists all")]
)
def test_an_unknown_command_names_the_nearest(given, said):
    done = run(given)
    assert (done.returncode, done.stderr) == (1, f"error: {given}: there is no such command; {said}\n")


def test_a_command_composes_what_its_script_does(installed, tmp_path):
    """Overrides, names of files as they are, and a YAML of the user's own; of the repository and of the wheel."""
    arguments = ["gpt_model_file=step=1.nemo", "adapter_file=b", "output_path=c", "--cfg", "job"]
    script = [sys.executable, str(ROOT / "scripts" / "merge_early_exits.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    expected = subprocess.run(
        script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "gpt_model_file: step=1.nemo\n" in expected.stdout
    for path in (ROOT, installed):
        assert run("merge", *arguments, path=path, cwd=tmp_path).stdout == expected.stdout
    own = "defaults:\n- merge_early_exits\n- _self_\ngpt_model_file: of_mine\n"
    (tmp_path / "mine.yaml").write_text(own)
    done = run("merge", "--config-dir=.", "--config-name=mine", "--cfg", "job", path=installed, cwd=tmp_path)
    assert "gpt_model_file: of_mine\n" in done.stdout and "overwrite: false\n" in done.stdout
    alone = "gpt_model_file: of_mine\noutput_path: ???\n"
    (tmp_path / "mine.yaml").write_text(alone)
    named = [f"--config-path={tmp_path}", "--config-name=mine"]
    assert run("merge", *named, "--cfg", "job", path=installed, cwd=tmp_path).stdout == alone


def test_errors_name_what_can_be_run(installed, tmp_path):
    """Where there is no repository, remedies name commands."""
    done = run("merge", "gpt_model_file=a", path=installed, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("is required")) == (1, 2)
    said = (
        "run python scripts/merge_early_exits.py, see scripts/other.py, or /a/scripts/preprocess_text.py x=1"
    )
    code = f"from nemo_ee.runtime.commands import as_installed; print(as_installed({said!r}))"
    for path, expected in (
        (ROOT, said),
        (installed, "run nemo-ee merge, see scripts/other.py, or nemo-ee preprocess x=1"),
    ):
        environment = {**os.environ, "PYTHONPATH": str(path)}
        told = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True
        )
        assert told.stdout.decode().strip() == expected
