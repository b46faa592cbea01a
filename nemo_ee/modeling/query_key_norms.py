# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Gradients of norms of queries and keys, which tensor-parallel ranks hold whole and see some heads of."""

import torch
from megatron.core import parallel_state

from nemo_ee.modeling.gpt import EarlyExitGPTModel
from nemo_ee.modeling.tied_weight import gradient_of

NAMES = ("q_layernorm.", "k_layernorm.")
"""megatron-core's, of layers and of exits' blocks."""


def sum_query_key_norms(gpt: EarlyExitGPTModel, sequence_parallel_are_summed: bool) -> None:
    """Sums them as megatron-core's `finalize_model_grads` does, for optimizers that NeMo reduces gradients for.

    Collectives: one all-reduce over the tensor-parallel group, where the model has such norms.

    Args:
        gpt: this stage's module, its gradients complete.
        sequence_parallel_are_summed: whoever calls sums parameters marked `sequence_parallel` anyway.
    """
    if not gpt.config.qk_layernorm or parallel_state.get_tensor_model_parallel_world_size() == 1:
        return
    gradients = [
        gradient_of(parameter)
        for name, parameter in gpt.named_parameters()
        if parameter.requires_grad
        and any(norm in name for norm in NAMES)
        and not (sequence_parallel_are_summed and getattr(parameter, "sequence_parallel", False))
    ]
    if not gradients:
        return
    together = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(together, group=parallel_state.get_tensor_model_parallel_group())
    for gradient, whole in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(whole.view_as(gradient))
