# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""scripts/env.sh: with which Python, from which list and over what it makes an environment; and where it refuses."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = "bash cat cp cut dirname find grep ls mkdir rm sha256sum tail touch".split()
"""All that env.sh may call beside Python, uname and a C++ compiler."""

PYTHON = """#!/bin/bash
# Stands for a Python: says its version, makes environments of itself, and notes what it is asked to install.
case "$*" in
*purelib*platlib*) ;;
*purelib*) mkdir -p "$(dirname "$0")/../packages" && echo "$(dirname "$0")/../packages" ;;
*"print("*) echo {version} ;;
*"import venv"*) exit {lacks_venv} ;;
*nemo.collections.nlp*) exit ${{NEMO_IS_MISSING:-1}} ;;
*apex*) exit 1 ;;
"-m venv"*) echo "$*" >>"$CALLS" && mkdir -p "${{@: -1}}/bin" && cp "$0" "${{@: -1}}/bin/python" ;;
*"pip list"*) echo torch==2.8.0a0+5228986c39.nv25.5 ;;
*"pip install"*)
    echo "$*" >>"$CALLS"
    case "$*" in *"${{FAILING:-none}}"*) exit 1 ;; esac ;;
--version) echo "Python {version}.0" ;;
esac
"""


class Machine:
    """A copy of the repository's scripts, and a PATH with nothing but what a test puts there."""

    def __init__(self, folder: Path):
        self.root, self.bin, self.calls = folder / "repository", folder / "bin", folder / "calls"
        shutil.copytree(ROOT / "scripts", self.root / "scripts", ignore=shutil.ignore_patterns("*.py"))
        shutil.copy(ROOT / "setup.py", self.root)
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.put("uname", '#!/bin/bash\n[ "$1" = -s ] && echo Linux || echo x86_64\n')
        self.put("c++", "#!/bin/bash\n")
        self.calls.touch()

    def put(self, name: str, text: str) -> str:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)
        return str(self.bin / name)

    def python(self, name: str, version: str, lacks_venv: int = 0) -> str:
        return self.put(name, PYTHON.format(version=version, lacks_venv=lacks_venv))

    def source(self, **environment: str) -> subprocess.CompletedProcess:
        """Sources env.sh and says with which Python in front."""
        command = 'source scripts/env.sh && echo "ready: $(command -v python)"'
        given = {"PATH": str(self.bin), "HOME": os.environ.get("HOME", "/"), "CALLS": str(self.calls)}
        return subprocess.run(
            [self.bin / "bash", "-c", command],
            cwd=self.root,
            env=given | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def refused(self, message: str, **environment: str) -> None:
        """Nothing is installed, and one line says why."""
        done = self.source(**environment)
        assert done.returncode != 0 and "ready" not in done.stdout
        assert done.stderr == f"error: {message}\n"
        assert self.calls.read_text() == ""


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    "given, version, pins",
    [
        ("python3.12", "3.12", "requirements/constraints-3.12.txt"),
        ("python3.11", "3.11", "requirements/constraints.txt"),
        (None, "3.11", "requirements/constraints.txt"),
    ],
)
def test_the_python_that_is_given_decides_what_is_installed(given, version, pins, machine):
    for name in ("python3.11", "python3.12"):
        machine.python(name, name.removeprefix("python"))
    environment = {"NEMO_EE_PYTHON": str(machine.bin / given)} if given else {}
    place = machine.root / (f".venv-{version}" if given else ".venv")
    done = machine.source(**environment)
    assert done.stdout.endswith(f"ready: {place}/bin/python\n"), done.stderr
    _, tools, torch, rest, ours = machine.calls.read_text().splitlines()
    listed = (ROOT / "scripts" / pins).read_text().splitlines()
    (pinned,) = (line for line in listed if line.startswith("torch=="))
    assert torch.endswith(f" {pinned}"), "first, and so from its own index where one is given"
    assert rest.endswith(
        f"-c {machine.root}/scripts/{pins} -r {machine.root}/scripts/requirements/requirements.txt"
    )
    assert f"-c {machine.root}/scripts/{pins}" in tools and "--no-deps" in ours
    before = machine.calls.read_text()
    assert "ready" in machine.source(**environment).stdout and machine.calls.read_text() == before


def test_a_python_that_cannot_be_used_is_refused(machine):
    remedy = "set it to a Python 3.11 or 3.12, or unset it"
    machine.python("python3.11", "3.11")
    machine.refused(
        f"NEMO_EE_PYTHON=/no/python: there is no such Python; {remedy}", NEMO_EE_PYTHON="/no/python"
    )
    new = machine.python("python3.13", "3.13")
    machine.refused(f"NEMO_EE_PYTHON={new}: is Python 3.13; {remedy}", NEMO_EE_PYTHON=new)
    bare = machine.python("python3.12", "3.12", lacks_venv=1)
    machine.refused(
        f"NEMO_EE_PYTHON={bare}: lacks its venv module; install it (on Debian and Ubuntu: python3.12-venv)",
        NEMO_EE_PYTHON=bare,
    )


def test_an_environment_of_another_python_is_not_taken_for_that_of_the_given_one(machine):
    assert machine.source(NEMO_EE_PYTHON=machine.python("python3.11", "3.11")).returncode == 0
    machine.calls.write_text("")
    other, venv = machine.python("python3.12", "3.12"), str(machine.root / ".venv-3.11")
    machine.refused(
        f"NEMO_EE_PYTHON={other}: is Python 3.12, and NEMO_EE_VENV={venv} holds an environment of 3.11; "
        "name another directory",
        NEMO_EE_PYTHON=other,
        NEMO_EE_VENV=venv,
    )


def test_a_source_package_without_a_compiler_is_an_error_before_anything_is_downloaded(machine):
    (machine.bin / "c++").unlink()
    done = machine.source(NEMO_EE_PYTHON=machine.python("python3.12", "3.12"))
    assert "install a C++ compiler" in done.stderr and "pip" not in machine.calls.read_text()


@pytest.mark.parametrize("missing", ["no", "network", "NeMo", "NVIDIA's mark"])
def test_in_a_container_only_what_is_missing_is_installed_gpu_or_not(missing, machine):
    machine.python("python3", "3.12")
    environment = {"NVIDIA_PYTORCH_VERSION": "25.05", "NEMO_IS_MISSING": "0"}
    if missing == "network":
        environment["FAILING"] = "requirements-container"
    elif missing == "NeMo":
        environment["NEMO_IS_MISSING"] = "1"
    elif missing != "no":
        environment["NVIDIA_PYTORCH_VERSION"] = ""  # as nemo_ee's CPU runtime leaves it
    done = machine.source(**environment)
    assert "ready: " in done.stdout, done.stderr
    calls = machine.calls.read_text()
    over = missing in ("no", "network")
    assert ("--system-site-packages" in calls) == over
    assert ("torch==" in calls) == (not over) and ("requirements/requirements.txt" in calls) == (not over)
    assert (
        "-r " + str(machine.root / "scripts" / "requirements/requirements-container.txt") in calls
    ) == over
    if over:
        kept = machine.root / ".venv" / "container_packages.txt"
        assert f"-c {kept} " in calls and kept.read_text() == "torch==2.8.0a0+5228986c39.nv25.5\n"
        assert ("Going on without" in done.stdout) == (missing == "network")


@pytest.mark.slow
def test_packages_of_a_container_whose_python_is_a_virtual_environments_are_seen(tmp_path):
    """Also those that are installed to be edited; the network is not there, and so nemo_ee itself not installed."""
    container, venv = tmp_path / "container", tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", container], check=True)
    packages = container / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    for package in ("torch", "nemo/collections/nlp"):
        (packages / package).mkdir(parents=True)
    (tmp_path / "edited" / "megatron" / "core").mkdir(parents=True)
    (packages / "edited.pth").write_text(f"{tmp_path / 'edited'}\n")
    environment = {
        "PATH": f"{container}/bin:/usr/bin:/bin",
        "NVIDIA_PYTORCH_VERSION": "25.05",
        "NEMO_EE_VENV": str(venv),
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": os.devnull,
    }
    done = subprocess.run(
        ["bash", "-c", "source scripts/env.sh"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert "NeMo container found" in done.stdout and "Going on without" in done.stdout, done.stderr
    seen = "import torch, nemo.collections.nlp, megatron.core"
    assert subprocess.run([venv / "bin" / "python", "-c", seen], env=environment).returncode == 0


CONTAINER = "or a container (docs/containers.md)"
SYSTEMS = {
    "Darwin arm64": f"macOS is not supported; use Linux {CONTAINER}",
    "Darwin x86_64": f"macOS is not supported; use Linux {CONTAINER}",
    "MINGW64_NT-10.0 x86_64": f"MINGW64_NT-10.0 is not supported; use Linux (on Windows: WSL) {CONTAINER}",
    "Linux ppc64le": "Linux on ppc64le is not supported: torch is not published for it; use x86_64 or aarch64",
    "Linux aarch64": None,
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_machines_for_which_there_are_no_packages_are_refused_by_name(name, machine):
    machine.python("python3.11", "3.11")
    system, processor = name.split()
    machine.put("uname", f'#!/bin/bash\n[ "$1" = -s ] && echo {system} || echo {processor}\n')
    if SYSTEMS[name]:
        machine.refused(SYSTEMS[name])
    else:
        assert "ready: " in machine.source().stdout
