# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""When torch's gradient scaler undoes its scale."""

from torch.optim import Optimizer


def unscale_before_step(optimizer: Optimizer) -> None:
    """Has torch's gradient scaler undo the scale before an optimizer's step, whatever kernels that has.

    It leaves it to fused kernels (2.13.0, `GradScaler.step`) to undo the scale and to skip a step: after gradients are
    clipped, and without asking the other model-parallel ranks for their infinities.
    """
    optimizer._step_supports_amp_scaling = False
