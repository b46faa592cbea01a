# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Per-exit statistics, summed over micro-batches and reduced over pipeline stages and data parallelism."""

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_ee.training.exit_loss import ExitLossResult, Statistic


@dataclass(frozen=True)
class ExitMeans:
    """Means over tokens: CE and KL in nats, the others as shares; `objective` is what tuning minimises."""

    loss: float
    divergence: float
    agreement: float
    confidence: float
    objective: float


class ExitMetrics:
    """Sums [exits + 1, one for each `Statistic`] in float64; row 0 is the final exit.

    Args:
        layers: exit layers of the whole model, ascending.
    """

    def __init__(self, layers: tuple[int, ...]):
        self.rows = {n: row for row, n in enumerate((0, *layers))}
        self._validation: list[Tensor] = []
        self.reset(torch.device("cpu"))

    def reset(self, device: torch.device) -> None:
        """Starts a new global batch."""
        self.sums = torch.zeros(len(self.rows), len(Statistic), dtype=torch.float64, device=device)

    def add(self, result: ExitLossResult) -> None:
        """Adds one micro-batch of this stage's exits; the final exit counts on its own stage only."""
        for n, stats in result.stats.items():
            if n or parallel_state.is_pipeline_last_stage():
                self.sums[self.rows[n]] += stats

    def reduce(self) -> dict[int, ExitMeans]:
        """Means over the whole global batch.

        Collectives: all-reduces the sums over the pipeline- and the data-parallel group.
        """
        for group in (
            parallel_state.get_pipeline_model_parallel_group(),
            parallel_state.get_data_parallel_group(),
        ):
            torch.distributed.all_reduce(self.sums, group=group)
        return self._means(self.sums)

    def keep(self) -> None:
        """Puts this global batch, reduced, to those of a validation."""
        self._validation.append(self.sums)

    def end_validation(self) -> dict[int, ExitMeans]:
        """Means over all global batches that were kept; forgets them."""
        sums = torch.stack(self._validation).sum(0)
        self._validation.clear()
        return self._means(sums)

    def _means(self, sums: Tensor) -> dict[int, ExitMeans]:
        """Of reduced sums; exits without tokens are left out."""
        tokens = sums[:, Statistic.TOKENS]
        values, seen = (sums / tokens[:, None].clamp_min(1)).tolist(), (tokens > 0).tolist()
        kinds = [each for each in Statistic if each is not Statistic.TOKENS]
        return {
            n: ExitMeans(**{kind.name.lower(): values[row][kind] for kind in kinds})
            for n, row in self.rows.items()
            if seen[row]
        }


def validation_values(means: dict[int, ExitMeans]) -> dict[str, float]:
    """What validation logs of every exit: `val_<what>/<exit>` -> value; agreement where the final exit is known."""
    values = {}
    for n, mean in means.items():
        name = f"exit_{n}" if n else "final"
        values[f"val_loss/{name}"] = mean.loss
        values[f"val_confidence/{name}"] = mean.confidence
        if n and 0 in means:
            values[f"val_agreement/{name}"] = mean.agreement
    return values
