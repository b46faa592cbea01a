# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The Dockerfile: its RUN lines do what they should over an environment that has NeMo, and lacks what containers lack.

No image is built. Instructions are followed one by one in a virtual environment that sees the packages of this one.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MISSING = ("gguf", "prometheus_client", "uvicorn")
"""Packages that this environment has and the pretended container has not."""

PULLED = {"torch": "99.0", "numpy": "99.0"}
"""Newer releases that would break a container."""


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, in order, continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line[:1] not in ("", "#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines()]


def test_it_follows_the_rules_of_hadolint():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert hadolint, "comes with scripts/requirements/requirements.txt"
    done = subprocess.run(
        [hadolint, "--failure-threshold", "warning", ROOT / "Dockerfile"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_it_stands_on_nemos_container_and_ends_with_the_check():
    steps = instructions()
    assert steps[:2] == [("ARG", "BASE_IMAGE=nvcr.io/nvidia/nemo:25.07"), ("FROM", "${BASE_IMAGE}")]
    assert steps[-1][0] == "RUN" and steps[-1][1].endswith("python scripts/requirements/check_imports.py")
    installs = [text for kind, text in steps if "pip install" in text]
    assert all("--no-deps" in text or "-c container_packages.txt" in text for text in installs)


def ignored(folder: str, names: list[str]) -> set[str]:
    """Of the names in a folder, those that .dockerignore keeps from the image."""
    patterns = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")
    ]
    top = Path(folder) == ROOT
    return {
        name
        for name in names
        for pattern in patterns
        if (top or pattern.startswith("**/")) and fnmatch(name, pattern.removeprefix("**/"))
    }


def test_the_image_gets_what_is_committed_and_nothing_large():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for path in map(Path, tracked.stdout.splitlines()):
        for depth, part in enumerate(path.parts):
            assert not ignored(str(ROOT.joinpath(*path.parts[:depth])), [part]), path
    made = (
        ".git .venv .venv-3.12 downloads quickstart_work nemo_experiments outputs my.nemo __pycache__".split()
    )
    assert ignored(str(ROOT), made) == set(made)


def wheel(name: str, folder: Path) -> None:
    """An installed package of Python files, packed again."""
    distribution = importlib.metadata.distribution(name)
    path = folder / f"{name}-{distribution.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in distribution.files:
            if ".." not in file.parts and file.suffix != ".pyc" and file.locate().is_file():
                archive.write(file.locate(), str(file))


def empty_wheel(name: str, version: str, folder: Path, requires: str = "") -> None:
    """A release that holds nothing."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += f"Requires-Dist: {requires}\n" if requires else ""
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def container(tmp_path) -> tuple[Path, dict[str, str]]:
    """A virtual environment with this one's packages but some, and an index on disk that would also give newer ones."""
    there = tmp_path / "there"
    there.mkdir()
    hidden = {"nemo_ee", *MISSING}
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        name = re.split(r"[-.]", entry.name.removeprefix("__editable__."))[0]
        if name not in hidden and not name.startswith("__editable__") and entry.name != "__pycache__":
            (there / entry.name).symlink_to(entry)
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    purelib = venv / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (purelib / "there.pth").write_text(f"{there}\n")
    shutil.rmtree(purelib / "setuptools", ignore_errors=True)  # the container's is meant
    for path in purelib.glob("setuptools-*"):
        shutil.rmtree(path)

    index = tmp_path / "index"
    index.mkdir()
    for name in MISSING:
        wheel(name, index)
    empty_wheel("gguf", "0.99.0", index, requires="numpy>=99")
    for name, version in PULLED.items():
        empty_wheel(name, version, index)
    pinned = tmp_path / "constraint.txt"
    pinned.write_text("gguf==0.0.1\n")
    kept = {name: os.environ[name] for name in ("HOME", "TMPDIR", "OMP_NUM_THREADS") if name in os.environ}
    return tmp_path, {
        **kept,
        "PATH": f"{venv}/bin:/usr/bin:/bin",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_CONSTRAINT": str(pinned),  # as NVIDIA's images have it
        "CUDA_VISIBLE_DEVICES": "",
    }


@pytest.mark.slow
def test_its_lines_add_what_is_missing_and_change_nothing_else(container):
    folder, environment = container
    before, output, directory = None, "", folder
    for kind, text in instructions():
        if kind == "ENV":
            name, _, value = text.partition("=")
            environment[name] = value
        elif kind == "WORKDIR":
            directory = folder / "image" / text.lstrip("/")
            directory.mkdir(parents=True)
        elif kind == "COPY":
            source, target = text.split()
            if source == ".":
                shutil.copytree(ROOT, directory / target, ignore=ignored, dirs_exist_ok=True)
            else:
                (directory / target).mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, directory / target)
        elif kind == "RUN":
            before = before or versions(environment)
            done = subprocess.run(
                ["/bin/sh", "-c", text], cwd=directory, env=environment, capture_output=True, text=True
            )
            output = done.stdout + done.stderr
            assert done.returncode == 0, (text, output[-3000:])
        else:
            assert kind in ("ARG", "FROM")
    after = versions(environment)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"nemo_ee", *MISSING}
    assert not set(before) - set(after)
    assert "every module of nemo_ee can be imported" in output and "not tested" not in output
    assert f"torch {importlib.metadata.version('torch')}" in output

    # The check finds what would be missing.
    subprocess.run(["python", "-m", "pip", "uninstall", "-qy", "uvicorn"], env=environment, check=True)
    done = subprocess.run(
        ["python", "scripts/requirements/check_imports.py"],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "error: uvicorn" in done.stderr and "is not installed" in done.stderr
    assert "error: nemo_ee.server.serve: ModuleNotFoundError" in done.stderr


def versions(environment: dict[str, str]) -> dict[str, str]:
    """Of all packages that its Python sees."""
    command = ["python", "-m", "pip", "list", "--format", "freeze", "--disable-pip-version-check"]
    listed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(line.split("==") for line in listed.stdout.splitlines())
