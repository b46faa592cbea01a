# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""LayerNorm and RMSNorm in plain torch, as a megatron-core layer spec expects them."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class TorchNorm(torch.nn.Module):
    """The norm that `config.normalization` names, over the last axis, in plain torch.

    Unlike megatron-core's own torch wrapper it works with sequence parallelism (its parameters are marked
    `sequence_parallel`, so that their gradients are summed over the tensor-parallel group) and with
    zero-centred gains (`layernorm1p`). Input and output: [..., H], any floating dtype.

    Args:
        config: backbone configuration.
        hidden_size: H.
        eps: added to the variance.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):
        super().__init__()
        self.eps, self.zero_centered = eps, bool(config.layernorm_zero_centered_gamma)
        self.rms = config.normalization == "RMSNorm"
        initial = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(initial(hidden_size, dtype=config.params_dtype))
        self.register_parameter(
            "bias",
            None if self.rms else torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype)),
        )
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def reset(self) -> None:
        """Unit gain and no bias."""
        with torch.no_grad():
            self.weight.fill_(0.0 if self.zero_centered else 1.0)
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Normalises [..., H] in float32 and returns the input's dtype, also under autocast."""
        weight = self.weight + 1.0 if self.zero_centered else self.weight
        shape = (x.shape[-1],)
        if self.rms:
            out = torch.nn.functional.rms_norm(x, shape, weight.to(x.dtype), self.eps)
        else:
            bias = self.bias.to(x.dtype)
            out = torch.nn.functional.layer_norm(x, shape, weight.to(x.dtype), bias, self.eps)
        return out.to(x.dtype)
