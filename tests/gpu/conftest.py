# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""float32 is float32 here: NVIDIA's images let matrix products round to TF32, which is 1e-3."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _full_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
