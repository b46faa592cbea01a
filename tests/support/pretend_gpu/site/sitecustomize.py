# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Read by every Python process whose PYTHONPATH has this folder."""

from tests.support.pretend_gpu import enable_with_torch

enable_with_torch()
