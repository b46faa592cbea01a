# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""How much of the final normed state fitted exits explain on text that the fit has not read."""

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_ee.modeling.gpt import EarlyExitGPTModel, StageStates
from nemo_ee.modeling.micro_batch import MicroBatch
from nemo_ee.modeling.token_layout import by_position, whole_tokens
from nemo_ee.runtime.collective import gather


class HeldOutFit:
    """R² of each exit's state against the final normed state, all axes together; feed it to `run_backbone`.

    R² = 1 - sum ||y - x||² / sum ||y - mean(y)||², over tokens with a loss mask: 1 is the final state itself, 0 no
    better than its mean.

    Args:
        gpt: this stage's module.
    """

    def __init__(self, gpt: EarlyExitGPTModel):
        self.gpt, device = gpt, next(gpt.parameters()).device
        self.rows = {n: row for row, n in enumerate(gpt.exit_layers)}
        self.errors = torch.zeros(len(self.rows), dtype=torch.float64, device=device)
        self.total = torch.zeros(gpt.config.hidden_size, dtype=torch.float64, device=device)
        self.squares = torch.zeros(2, dtype=torch.float64, device=device)  # of the final state; and tokens

    def __call__(self, batch: MicroBatch, states: StageStates, final: Tensor | None) -> None:
        """Adds one micro-batch. Collectives: those of the heads over the tensor-parallel group."""
        parallel = self.gpt.config.sequence_parallel
        keep = (by_position(batch.loss_mask) > 0)[:, None]
        target = whole_tokens(final, parallel).double().masked_fill(~keep, 0.0)
        self.total += target.sum(0)
        self.squares += torch.stack([target.square().sum(), keep.sum().double()])
        for n, row in self.rows.items():
            head = self.gpt.exits[str(n)]
            hidden = states.exits[n].to(head.linear.weight.dtype)
            state = head(hidden, batch.attention_mask, states.rotary_pos_emb)
            error = (whole_tokens(state, parallel).double() - target).masked_fill_(~keep, 0.0)
            self.errors[row] += error.square().sum()

    def finish(self) -> dict[int, float]:
        """Exit layer -> R², of all stages.

        Collectives: all-reduces sums over the data-parallel group, gathers numbers over the pipeline.
        """
        for tensor in (self.errors, self.total, self.squares):
            torch.distributed.all_reduce(tensor, group=parallel_state.get_data_parallel_group())
        variance = self.squares[0] - self.total.square().sum() / self.squares[1]
        mine = {n: float(1 - self.errors[row] / variance) for n, row in self.rows.items()}
        stages = gather(mine, parallel_state.get_pipeline_model_parallel_group())
        return {n: value for stage in stages for n, value in stage.items()}
