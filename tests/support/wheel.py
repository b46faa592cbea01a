# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The project's wheel, built offline from a copy of what it is made of."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.script import ROOT

BUILD = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
"""What `python -m build` has the build backend do, without an environment made for it."""


def build_wheel(directory: Path) -> Path:
    """Builds it in a new directory, which is left to the caller; the repository stays as it is."""
    source = directory / "source"
    unwanted = shutil.ignore_patterns("__pycache__", "*.pyc")
    for folder in ("nemo_ee", "conf", "scripts"):
        shutil.copytree(ROOT / folder, source / folder, ignore=unwanted)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-c", BUILD]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=300)
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel
