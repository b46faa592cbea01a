# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which parameters decay."""

from collections.abc import Iterable

import torch
from omegaconf import DictConfig


def decays_vectors(cfg: DictConfig) -> bool:
    """Whether norms and biases decay, too."""
    return bool(cfg.get("do_layer_norm_weight_decay", False))


def parameter_groups(parameters: Iterable[torch.nn.Parameter], cfg: DictConfig) -> tuple[dict, dict]:
    """NeMo's two groups of an optimizer: what decays, and what does not; either may be empty.

    Args:
        parameters: those that are trained.
        cfg: model configuration.
    """
    decayed, spared = [], []  # by shape, since NeMo knows Apex's norms only
    for parameter in parameters:
        (spared if parameter.dim() < 2 and not decays_vectors(cfg) else decayed).append(parameter)
    return (
        {"params": decayed, "is_expert": False},
        {"params": spared, "weight_decay": 0.0, "is_expert": False},
    )
