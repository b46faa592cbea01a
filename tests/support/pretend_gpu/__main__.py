# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Runs a script as if there were GPUs: python -m tests.support.pretend_gpu [--gpus N] SCRIPT ARGUMENTS."""

import os
import sys

from tests.support.pretend_gpu import environment

arguments = sys.argv[1:]
gpus = 1
if arguments[:1] == ["--gpus"]:
    gpus, arguments = int(arguments[1]), arguments[2:]
if not arguments:
    sys.exit(__doc__)
os.execve(sys.executable, [sys.executable, *arguments], environment(gpus))
