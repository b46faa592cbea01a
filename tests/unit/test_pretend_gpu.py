# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The pretend GPU itself: it refuses what a GPU refuses, takes what a GPU takes, and counts every wait.

The checks run in one process of its own, as the pretend GPU changes torch.
"""

import copy
import io
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.support.pretend_gpu import GPUS, environment

PRETEND = GPUS in os.environ
if not PRETEND:

    def test_in_a_process_of_its_own():
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
        result = subprocess.run(
            command, env=environment(2), cwd=Path(__file__).parents[2], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
        assert "skipped" not in result.stdout.splitlines()[-1]
else:
    from tests.support.pretend_gpu import waits
    from tests.support.pretend_gpu.tensor import CudaTensor

pretend_only = pytest.mark.skipif(not PRETEND, reason="runs in the process that the test above starts")
