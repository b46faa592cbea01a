# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What a training step computes at once."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch, whole on every rank of the model-parallel group.

    Attributes:
        tokens: [B, S].
        labels: [B, S] next tokens.
        loss_mask: [B, S], 0 leaves a token out.
        position_ids: [B, S].
        attention_mask: True hides; None means causal.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None = None
