# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Closed-form fit of an exit's translator: ridge regression from features to the final normed state."""

import torch
from torch import Tensor


class RidgeAccumulator:
    """Accumulates X'X and X'Y in float64, X = [features, 1], Y = targets, and solves for a linear map and bias.

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

    def update(self, features: Tensor, targets: Tensor, counts: Tensor | None = None) -> None:
        """Adds rows: features [N, F], targets [N, T], any floating dtype.

        `counts` [N] says which rows count; None means all. The others are set to zero: to leave them out, a GPU
        would have to be waited for.
        """
        x, y = features.to(torch.float64), targets.to(torch.float64, copy=counts is not None)
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        if counts is not None:
            x.masked_fill_(~counts[:, None], 0.0)
            y.masked_fill_(~counts[:, None], 0.0)
        self.gram.addmm_(x.T, x)
        self.cross.addmm_(x.T, y)

    def solve(self, penalty: float, groups: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """Weight [T, F] and bias [T] of the fit, in float64, by Cholesky's decomposition.

        Uses the sums up: `gram` becomes its own factor, since at 70B parameters a second one has 11 GB. Besides
        it there are two tensors of the size of `cross`.

        Args:
            penalty: relative to the mean diagonal of X'X within each group of features.
            groups: widths of groups of features of different scale, summing to F; one group by default. The
                bias goes all but unpenalised.
        """
        diagonal = self.gram.diagonal()
        for part in diagonal[:-1].split(groups or [len(diagonal) - 1]):
            part += penalty * part.mean()
        diagonal[-1:] *= 1 + 1e-6
        lower = self.gram.mT  # the same matrix, in LAPACK's order of memory
        torch.linalg.cholesky(lower, out=lower)
        half = torch.linalg.solve_triangular(lower, self.cross, upper=False)
        solution = torch.linalg.solve_triangular(lower.mT, half, upper=True)
        return solution[:-1].T, solution[-1]
