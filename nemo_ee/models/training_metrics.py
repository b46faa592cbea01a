# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Statistics of exits that are trained with their backbone: loss, confidence, agreement with the final exit.

Exits are evaluated on their stages at other times than the final exit, so most probable tokens are kept
[micro-batches, T] until the global batch is done; then the last stage sends its own to the others.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_ee.head_config import HeadConfig
from nemo_ee.modeling.gpt import EarlyExitGPTModel
from nemo_ee.modeling.projection import ExitProjection
from nemo_ee.modeling.token_layout import by_position, whole_tokens
from nemo_ee.models.exit_metrics import ExitMeans, ExitMetrics
from nemo_ee.training.exit_loss import ExitLossResult, Statistic, Teacher, exit_losses


class TrainingMetrics(ExitMetrics):
    """Of one global batch; see `ExitMetrics` for `sums`.

    Args:
        layers: exit layers of the whole model, ascending.
        gpt: this stage's module.
    """

    def __init__(self, layers: tuple[int, ...], gpt: EarlyExitGPTModel):
        super().__init__(layers)
        self.gpt, self.observing = gpt, False
        self._best: dict[tuple[int, int], Tensor] = {}
        self._masks: dict[int, Tensor] = {}

    def start(self, device: torch.device, observe: bool) -> None:
        """Begins a global batch; without `observe` nothing is kept."""
        self.observing = observe
        self.reset(device)
        self._best.clear()
        self._masks.clear()
        self._not_finite = torch.zeros(len(self.rows), device=device)

    def add_exit(self, index: int, mask: Tensor, result: ExitLossResult) -> None:
        """Adds one exit on micro-batch number `index`, whose loss mask [B, S] is `mask`."""
        self.note_finite(result)
        if not self.observing:
            return
        self.add(result)
        self._masks[index] = by_position(mask)
        for n, best in result.best_tokens.items():
            self._best[n, index] = best

    def note_finite(self, result: ExitLossResult) -> None:
        """Notes whether exits' losses are numbers; all that is noted of a fill."""
        for n, stats in result.stats.items():
            both = stats[Statistic.LOSS] + stats[Statistic.OBJECTIVE]
            self._not_finite[self.rows[n]] += both.isfinite().logical_not()

    def not_finite(self, final_loss: Tensor) -> dict[int, float]:
        """Exits whose losses in this global batch are no numbers, with NaN for each. Collective over the world.

        Waits for the device.

        Args:
            final_loss: of the final exit, on the last stage.
        """
        if parallel_state.is_pipeline_last_stage():
            self._not_finite[0] += final_loss.detach().isfinite().logical_not().any()
        torch.distributed.all_reduce(self._not_finite, torch.distributed.ReduceOp.MAX)
        found = self._not_finite.tolist()
        return {n: float("nan") for n, row in self.rows.items() if found[row]}

    @contextmanager
    def final_exit(self, index: int, mask: Tensor) -> Iterator[None]:
        """Observes the final exit within, on the last stage; elsewhere nothing. Chunk by chunk, as exits."""
        if not self.observing or not parallel_state.is_pipeline_last_stage():
            yield
            return

        def observe(_module: torch.nn.Module, args: tuple) -> None:
            # Before the output layer makes all logits; again, in float32 as the exits' statistics: logits in half
            # precision have many equal maxima. The cross-entropy is Megatron's own, see `add_final_loss`.
            with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
                state = whole_tokens(args[0].detach(), self.gpt.config.sequence_parallel)
                state = state.to(torch.promote_types(state.dtype, torch.float32))
                self._masks[index] = counted = by_position(mask)
                weight, world = (
                    self.gpt.output_weight(),
                    parallel_state.get_tensor_model_parallel_world_size(),
                )
                projection = ExitProjection(
                    self.gpt.config,
                    HeadConfig(projection="tied"),
                    self.gpt.true_vocab_size,
                    world * len(weight),
                )
                result = exit_losses(
                    {},
                    weight,
                    torch.zeros_like(counted, dtype=torch.long),
                    counted,
                    self.gpt.early_exit.training.objective,
                    Teacher(state, projection),
                )
                self._best[0, index] = result.best_tokens[0]
                for kind in (Statistic.AGREEMENT, Statistic.CONFIDENCE, Statistic.TOKENS):
                    self.sums[0, kind] += result.stats[0][kind]

        hook = self.gpt.output_layer.register_forward_pre_hook(observe)
        try:
            yield
        finally:
            hook.remove()

    def add_final_loss(self, losses: Tensor, mask: Tensor) -> None:
        """Adds the final exit's cross-entropies [B, S]."""
        if self.observing:
            total = (losses.detach().double() * mask).sum()
            for kind in (Statistic.LOSS, Statistic.OBJECTIVE):
                self.sums[0, kind] += total

    def finish(self, num_microbatches: int) -> dict[int, ExitMeans]:
        """Means over the global batch. Collective over the pipeline- and the data-parallel group."""
        self._add_agreement(num_microbatches)
        return self.reduce()

    def _add_agreement(self, num_microbatches: int) -> None:
        final = self._final_tokens(num_microbatches)
        for (n, index), best in self._best.items():
            if n:
                self.sums[self.rows[n], Statistic.AGREEMENT] += (
                    (best == final[index]) * self._masks[index]
                ).sum()

    def _final_tokens(self, num_microbatches: int) -> Tensor:
        """[micro-batches, T] the final exit's most probable tokens, on every stage."""
        final = torch.zeros(0, 0, dtype=torch.long, device=self.sums.device)
        if parallel_state.is_pipeline_last_stage():
            final = torch.stack([self._best[0, index] for index in range(num_microbatches)])
        if parallel_state.get_pipeline_model_parallel_world_size() == 1:
            return final
        group = parallel_state.get_pipeline_model_parallel_group()
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        shape = torch.tensor(final.shape, device=final.device)
        torch.distributed.broadcast(shape, source, group=group)
        if not parallel_state.is_pipeline_last_stage():
            final = final.new_empty(shape.tolist())
        torch.distributed.broadcast(final, source, group=group)
        return final
