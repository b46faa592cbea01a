# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Closed-form fit of an exit's translator: ridge regression from features to the final normed state."""

import torch
from torch import Tensor


class RidgeAccumulator:
    """Accumulates X'X and X'Y in float64, X = [features, 1], Y = targets, and solves for a linear map with bias.

    Sums of accumulators are accumulators of the joined data, so ranks add theirs up (all-reduce `gram` and
    `cross`) before solving.

    Args:
        features: width of the inputs.
        targets: width of the outputs.
        device: where to accumulate.
    """

    def __init__(self, features: int, targets: int, device: torch.device | str = "cpu"):
        self.gram = torch.zeros(features + 1, features + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(features + 1, targets, dtype=torch.float64, device=device)

    def update(self, features: Tensor, targets: Tensor) -> None:
        """Adds rows: features [N, F], targets [N, T], any floating dtype."""
        x = features.to(torch.float64)
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        self.gram += x.T @ x
        self.cross += x.T @ targets.to(torch.float64)

    def solve(self, penalty: float) -> tuple[Tensor, Tensor]:
        """Weight [T, F] and bias [T] of the fit, in float64.

        Args:
            penalty: relative to the mean diagonal of X'X; the bias is penalised like every weight.
        """
        ridge = penalty * self.gram.diagonal().mean() * torch.eye(len(self.gram), dtype=torch.float64)
        solution = torch.linalg.solve(self.gram + ridge.to(self.gram.device), self.cross)
        return solution[:-1].T.contiguous(), solution[-1].contiguous()
