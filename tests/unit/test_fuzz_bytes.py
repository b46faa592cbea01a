# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Five minutes of coverage-guided fuzzing for each parser of bytes."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from tests.support.other_process import ROOT

SECONDS = 300


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed: pip install atheris"
)
@pytest.mark.parametrize("parser", ("tar", "gguf"))
def test_atheris_finds_nothing(parser, tmp_path):
    command = [sys.executable, "-m", "tests.support.fuzz_bytes", parser, str(SECONDS), str(tmp_path / "fuzz")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS + 200
    )
    assert run.returncode == 0, run.stderr[-4000:]
    executed = int(re.search(r"number_of_executed_units:\s*(\d+)", run.stderr)[1])
    print(f"{parser}: {executed} inputs in {SECONDS} s")
    assert executed > 1000
