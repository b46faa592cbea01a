# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""torch's Adam and AdamW in one kernel for all parameters, on a GPU and on a CPU."""

from typing import Any

from nemo.core.optim.mcore_optim import McoreDistributedOptimizer
from nemo.core.optim.optimizer_with_main_params import MainParamsOptimizerWrapper
from omegaconf import DictConfig
from torch.optim import Adam, AdamW, Optimizer

from nemo_ee.runtime.upstream.gradient_scaling import unscale_before_step


def megatron_optimizers(optimizer: McoreDistributedOptimizer) -> list:
    """Megatron's distributed optimizers within NeMo's wrapper: one, since there are no experts."""
    whole = optimizer.mcore_optimizer
    return getattr(whole, "chained_optimizers", [whole])


def inner_optimizers(optimizer: Any) -> list[Optimizer]:
    """The optimizers of torch or Apex within Megatron's and NeMo's wrappers: theirs are the states.

    None is within Megatron's on a stage that has nothing to train.
    """
    if isinstance(optimizer, MainParamsOptimizerWrapper):
        return [optimizer.optimizer]
    if not isinstance(optimizer, McoreDistributedOptimizer):
        return [optimizer]
    return [part.optimizer for part in megatron_optimizers(optimizer) if part.optimizer is not None]


def is_torch_adam(optimizer: Optimizer) -> bool:
    """Whether an optimizer is torch's Adam or AdamW."""
    return isinstance(optimizer, Adam | AdamW)


def choose_kernels(optimizer: Any, cfg: DictConfig) -> None:
    """Sets whether torch's Adam or AdamW is fused: as `optim.fused` says, and by default it is.

    Other optimizers stay as they are. To be called before the first step.

    Args:
        optimizer: NeMo's, Megatron's or torch's.
        cfg: the model's section `optim`.
    """
    fused = cfg.get("fused")
    if fused is None:
        fused = not (cfg.get("foreach") or cfg.get("differentiable"))
    for inner in filter(is_torch_adam, inner_optimizers(optimizer)):
        inner.defaults["fused"] = fused
        for group in inner.param_groups:
            group["fused"] = fused
        unscale_before_step(inner)


def keep_kernels(saved: list[dict], optimizer: Optimizer) -> None:
    """Puts this run's kernels into saved parameter groups that are about to be loaded, which name their own.

    A checkpoint may come from another machine, or from before there was a choice.
    """
    if is_torch_adam(optimizer):
        for group in saved:
            group["fused"] = optimizer.defaults["fused"]
