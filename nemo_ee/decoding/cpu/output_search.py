# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The greedy token of an output layer at a quarter of its bytes: searched in 8 bits, and the layer's own all the same.

Suffixes: N tokens, H hidden size, R rows.
"""

import numpy as np
import torch
from torch import Tensor

from nemo_ee.decoding.cpu.cpu_kernels import ONE_AT_A_TIME, kernel_linear, kernel_norm, run_quantise, threads
from nemo_ee.decoding.cpu.kernels.search import Search, search
from nemo_ee.decoding.cpu.lean_weights import INT8_TOKENS, DenseLinear, LeanNorm

OUTPUT_LAYERS = ("exact8", "full")
"""How decoding finds greedy tokens of full depth: `exact8`, by a search where there is one (see
`nemo_ee.decoding.layers.lean_head.LeanOutput.can_be_searched`); or by all logits."""


class OutputSearch:
    """Searches an output layer, see `nemo_ee.decoding.cpu.kernels.search`.

    Args:
        projection: the layer, [R, H], with kernels; not in 8 bits itself.
        norm: RMSNorm before it; None for none.
        dtype: of states.
    """

    def __init__(self, projection: DenseLinear, norm: LeanNorm | None, dtype: torch.dtype):
        rough = run_quantise(projection.weight)
        slack, rounding = slack_of(rough.lengths, rough.quantised.shape[1], dtype)
        linear, exact = (
            kernel_linear(rough.quantised, rough.scales, None, dtype),
            projection.kernels[-1][1].weight,
        )
        self.limit, self.bytes = INT8_TOKENS, rough.quantised.numel()
        self._rows = len(projection.weight)
        self._logits = np.empty(
            self.limit * self._rows, exact.dtype if exact.dtype.kind == "f" else np.float32
        )
        self._layer = Search(linear, exact, slack.numpy(), rounding.numpy(), kernel_norm(norm, dtype))

    def __call__(self, emittable: int, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The most probable tokens [N] after states [N, H] and their probabilities [N] by 8-bit logits; None where
        one of them is for the layer itself to say. For at most `limit` tokens."""
        found = self.arrays(emittable, x.contiguous().numpy())
        return None if found is None else (torch.from_numpy(found[0]), torch.from_numpy(found[1]))

    def arrays(self, emittable: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """The same, of arrays."""
        count, kind = len(x), x.dtype
        token, sure, settled = np.empty(count, np.int64), np.empty(count, kind), np.empty(count, np.bool_)
        with ONE_AT_A_TIME:
            logits = self._logits[: count * self._rows].reshape(count, self._rows)
            search(self._layer, emittable, x, logits, token, sure, settled, threads())
        return (token, sure) if settled.all() else None


def slack_of(lengths: Tensor, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """By how much a row's logit may be off, over the state's length: bounds [R] in float32, rounded up.

    With n operations of unit roundoff u in any order, a product is off by at most g |w| |x|, g = n u / (1 - n u)
    (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). n is 2 H + 16 here: twice what a product
    takes, for the norm before it, whose error is one factor for all features and some units in the last place of each.

    Args:
        lengths: [3, R] see `EightBitRows`.
        hidden: H.
        dtype: to compute in.

    Returns:
        Of the 8-bit logit against the layer's, and of the layer's against the exact one.
    """
    own, eight, difference = lengths
    operations = (2 * hidden + 16) * torch.finfo(dtype).eps / 2
    off = 2 * operations / (1 - operations)
    slack = (difference + off * (own + eight)) * (1 + 1e-6)
    return slack.float(), (off * own * (1 + 1e-6)).float()
