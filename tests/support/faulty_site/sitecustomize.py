# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Read by every Python process whose PYTHONPATH has this folder before others."""

from tests.support import planted_faults, pretend_gpu

pretend_gpu.enable_with_torch()
planted_faults.plant_with_its_place()
