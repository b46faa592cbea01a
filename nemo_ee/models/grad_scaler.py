# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""NeMo's loss scaler of half precision, for pipelines in which a stage may have nothing to train."""

from typing import Any

import torch
from nemo.collections.nlp.parts.nlp_overrides import GradScaler


class EarlyExitGradScaler(GradScaler):
    """`GradScaler` that takes a stage without gradients for one whose gradients are finite.

    torch's fails there, while the other stages wait for this one to say whether it found infinities.
    """

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, *more: Any
    ) -> dict[torch.device, torch.Tensor]:
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, *more)
        return found or {found_inf.device: torch.zeros_like(found_inf)}
