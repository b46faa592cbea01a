# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Exit heads: what stands between the hidden state after a transformer layer and its logits."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from nemo_ee.head_config import HeadConfig
from nemo_ee.modeling.norms import TorchNorm
from nemo_ee.modeling.projection import ExitProjection
from nemo_ee.modeling.replicated import replicated
from nemo_ee.modeling.specs import gpt_layer_spec, mlp_spec


@dataclass(frozen=True)
class ExitSurroundings:
    """What a head's transformer block needs besides the hidden state, as the backbone's layers do."""

    attention_mask: Tensor | None = None
    rotary_pos_emb: Tensor | None = None
    packed_seq_params: PackedSeqParams | None = None


class NormedMLP(MegatronModule):
    """MLP(norm(x)), the MLP of the backbone's own kind. [S, B, H] -> [S, B, H]."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config=config)
        self.norm = TorchNorm(config, config.hidden_size, config.layernorm_epsilon)
        group = parallel_state.get_tensor_model_parallel_group()
        self.mlp = build_module(
            mlp_spec(), config=config, ffn_hidden_size=config.ffn_hidden_size, tp_group=group
        )

    def forward(self, x: Tensor) -> Tensor:
        """The MLP's output, to be added to something."""
        out, bias = self.mlp(self.norm(x))
        return out if bias is None else out + bias


class Translator(MegatronModule):
    """A linear map [H] -> [H] with bias, whole on every tensor-parallel rank.

    With sequence parallelism each rank maps its own positions and the weights' gradients are summed over the
    tensor-parallel group (the parameters are marked `sequence_parallel`).
    """

    def __init__(self, config: TransformerConfig):
        super().__init__(config=config)
        size = config.hidden_size
        self.weight = torch.nn.Parameter(torch.eye(size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Maps the last axis."""
        return torch.nn.functional.linear(x, self.weight, self.bias)


class ExitHead(MegatronModule):
    """block, then MLP, norm and translator, then the projection, as `HeadConfig` chooses.

    A `residual` MLP is one more step before the norm: norm(x + MLP(x)), as in EE-Tuning. One `beside` the
    translator adds to its output: translator(norm(x)) + MLP(x); both are linear in their last weights, which is
    what the closed form fits at once. The MLP has a norm of its own.

    Args:
        config: configuration of the exits, see `exit_config`.
        head: which modules.
        layer: the 1-based exit layer.
        vocab_size: V, the tokenizer's vocabulary.
        padded_vocab_size: V padded to a multiple of TP.
        use_te: Transformer Engine's modules for the block; None takes what the machine has.
    """

    def __init__(
        self,
        config: TransformerConfig,
        head: HeadConfig,
        layer: int,
        vocab_size: int,
        padded_vocab_size: int,
        use_te: bool | None = None,
    ):
        super().__init__(config=config)
        self.layer, self.head = layer, head
        self.block = self.mlp = self.norm = self.linear = None
        if head.block:
            # TransformerLayer adds the stage's offset to the number that it is given; a head's is global.
            number = layer - get_transformer_layer_offset(config)
            self.block = build_module(gpt_layer_spec(config, use_te), config=config, layer_number=number)
        if head.mlp != "none":
            self.mlp = NormedMLP(config)
        if head.norm:
            self.norm = TorchNorm(config, config.hidden_size, config.layernorm_epsilon)
        if head.linear:
            self.linear = Translator(config)
        self.projection = ExitProjection(config, head, vocab_size, padded_vocab_size)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """The state that the projection reads.

        Args:
            hidden: [S, B, H] (S/TP under sequence parallelism), the output of transformer layer `layer`.
            attention_mask: for the block; True hides. None means causal.
            rotary_pos_emb: for the block.
            packed_seq_params: for the block, where sequences are packed.

        Returns:
            [S, B, H], sharded as `hidden`.
        """
        inside = self.behind_block(
            hidden,
            attention_mask=attention_mask,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
        )
        return self.readout(inside)

    def behind_block(self, hidden: Tensor, **for_block: Any) -> Tensor:
        """What `readout` reads, [S, B, H] as `hidden`; `for_block` are the others of `forward`'s arguments."""
        return hidden if self.block is None else self.block(hidden, **for_block)[0]

    def readout(self, x: Tensor) -> Tensor:
        """What follows the block, position by position: [S, B, H] -> [S, B, H]."""
        branch = None if self.mlp is None else self.mlp(x)
        if self.head.mlp == "residual":
            x = x + branch
        if self.norm is not None:
            x = self.norm(x)
        if self.linear is not None:
            x = self.linear(x)
        return x + branch if self.head.mlp == "beside" else x

    def reset_for_fit(self) -> None:
        """What the closed form starts from: the block is the identity, the norm has no gain."""
        with torch.no_grad():
            if self.block is not None:
                for name, parameter in self.block.named_parameters():
                    if "linear_proj." in name or "linear_fc2." in name:
                        parameter.zero_()
            if self.norm is not None:
                self.norm.reset()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """As megatron-core's; the translator is replicated over the tensor-parallel group."""
        state = {}
        for name, module in self.named_children():
            state.update(_sharded(module, f"{prefix}{name}.", sharded_offsets, metadata))
        return state


def _sharded(module: torch.nn.Module, prefix: str, offsets: tuple, metadata: dict | None) -> ShardedStateDict:
    if hasattr(module, "sharded_state_dict") and not isinstance(module, Translator | NormedMLP):
        return module.sharded_state_dict(prefix, offsets, metadata)
    state = {
        f"{prefix}{name}": replicated(parameter, f"{prefix}{name}", offsets)
        for name, parameter in module.named_parameters(recurse=False)
    }
    for name, child in module.named_children():
        state.update(_sharded(child, f"{prefix}{name}.", offsets, metadata))
    return state


def exit_config(config: TransformerConfig, params_dtype: torch.dtype) -> TransformerConfig:
    """The exits' configuration: the backbone's, with weights in `params_dtype` and no dropout."""
    mine = copy.copy(config)
    mine.params_dtype = params_dtype
    mine.hidden_dropout = mine.attention_dropout = 0.0
    return mine
