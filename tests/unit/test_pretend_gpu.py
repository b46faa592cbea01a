# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The pretend GPU refuses what a GPU refuses, takes what a GPU takes, and counts every wait."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.pretend_gpu import environment, pool

CHECKS = "tests/unit/pretend_gpu_checks.py", "tests/unit/pretend_gpu_wait_checks.py"


def test_checks_pass_in_a_process_of_their_own():
    """They are no tests of this process, where there is no GPU, not even a pretend one."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CHECKS]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment(2), cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_one_nothing_is_run():
    with pytest.raises(AssertionError, match="no pretend GPU"):
        pool.on_a_gpu(print)
