# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Weights of exits' losses and rates of dropped layers: pure functions of the global step.

A resumed run therefore continues exactly, whatever it had done before.
"""

import math

from nemo_ee.config import LayerDropoutConfig, TrainingConfig


def loss_weights(
    config: TrainingConfig, layers: tuple[int, ...], num_layers: int, step: int
) -> dict[int, float]:
    """Exit layer -> weight of its loss in optimizer step `step` (from 0); see `TrainingConfig`."""
    base = config.loss_weights or tuple(n / num_layers for n in layers)
    factor = schedule_factor(config, step)
    return {
        n: weight * factor if takes_part(config, index, len(layers), step) else 0.0
        for index, (n, weight) in enumerate(zip(layers, base, strict=True))
    }


def schedule_factor(config: TrainingConfig, step: int) -> float:
    """The factor of all weights: from `initial_factor` at step 0 to 1 at `schedule_steps`, then 1."""
    if config.schedule == "constant" or step >= config.schedule_steps:
        return 1.0
    progress = step / config.schedule_steps
    if config.schedule == "cosine":
        progress = (1.0 - math.cos(math.pi * progress)) / 2.0
    return config.initial_factor + (1.0 - config.initial_factor) * progress


def takes_part(config: TrainingConfig, index: int, count: int, step: int) -> bool:
    """Whether the curriculum has exit number `index` (from 0, the shallowest) of `count` in this step."""
    if config.curriculum == "rotational":
        period = config.curriculum_period or count
        return index % period == step % period
    if config.curriculum == "gradual":
        later = count - 1 - index
        return later == 0 or step * (count - 1) >= later * config.curriculum_steps
    return True


def layer_dropout_rate(config: LayerDropoutConfig, layer: int, num_layers: int, step: int) -> float:
    """The share of samples that skip a layer (1-based) in a step; see `LayerDropoutConfig`."""
    if config.max_rate == 0.0 or num_layers == 1:
        return 0.0
    rate = config.max_rate * (2.0 ** ((layer - 1) / (num_layers - 1)) - 1.0)
    if config.schedule == "exponential":
        rate *= 2.0 ** min(1.0, step / config.steps) - 1.0
    return rate
