# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Exit heads, the final exit and the embedding as functions of their weights, for decoding.

Suffixes: T tokens, N tokens to predict after, H hidden size, R rows of this tensor-parallel rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from nemo_ee.core.confidence import RowSummary, summarise_rows
from nemo_ee.megatron.cpu_kernels import run_readout
from nemo_ee.megatron.gpt import EarlyExitGPTModel
from nemo_ee.megatron.heads import ExitHead
from nemo_ee.megatron.lean_layer import LeanMLP, is_lean_mlp
from nemo_ee.megatron.lean_weights import DenseLinear, LeanNorm, is_lean_norm, lean_linear
from nemo_ee.megatron.prediction import Prediction, Rows


class LeanHead:
    """An exit head behind its block; see `ExitHead.readout` and `ExitProjection.local_logits`.

    Args:
        head: the modules.
        output_weight: the backbone's [Vp/TP, H], for a tied projection.
        dtype: to compute in.
        weights: see `WEIGHT_KINDS`.
    """

    def __init__(self, head: ExitHead, output_weight: Tensor, dtype: torch.dtype, weights: str):
        self.dtype, self.rows = dtype, Rows.of_exit(head.projection)
        self.norm = None if head.norm is None else LeanNorm.of(head.norm)
        self.mlp_norm = self.mlp = self.linear = None
        if head.mlp is not None:
            assert is_lean_mlp(head.mlp.mlp), "exit heads are built of torch modules"
            self.mlp_norm = LeanNorm.of(head.mlp.norm)
            self.mlp = LeanMLP(head.mlp.mlp, dtype, weights)
        if head.linear is not None:
            self.linear = lean_linear(head.linear.weight, head.linear.bias, dtype, weights)
        projection = head.projection
        weight = output_weight if projection.weight is None else projection.weight
        self.projection = lean_linear(weight, None, dtype, weights)
        bucket = (projection.bucket_weight, projection.bucket_bias) if projection.holds_bucket else ()
        self.to_tokens = Readout(self.projection, self.rows, [part.detach().to(dtype) for part in bucket])

    @property
    def bytes(self) -> int:
        """Of weights that a prediction reads."""
        linears = [self.projection, self.linear]
        if self.mlp is not None:
            linears += [self.mlp.up, self.mlp.down]
        return sum(part.bytes for part in linears if part is not None)

    def readout(self, x: Tensor) -> Tensor:
        """The state that the projection reads, [N, H] -> [N, H]. Collectives: an MLP's."""
        if self.linear is None:
            if self.mlp is not None:
                x = self.mlp.onto(x, self.mlp_norm(x))
            return x if self.norm is None else self.norm(x)
        state = self.linear(x if self.norm is None else self.norm(x))
        return state if self.mlp is None else self.mlp.onto(state, self.mlp_norm(x))

    def predict(self, x: Tensor) -> Prediction:
        """From the (block's) hidden state [N, H]. Collectives: see `Prediction.from_summary`."""
        return self.to_tokens.predict(self.readout(x.to(self.dtype)))


class LeanOutput:
    """The final norm and the output layer.

    Args:
        gpt: the last pipeline stage.
        dtype: to compute in.
        weights: see `WEIGHT_KINDS`.
    """

    def __init__(self, gpt: EarlyExitGPTModel, dtype: torch.dtype, weights: str):
        self.dtype, self.rows = dtype, Rows.of_output_layer(gpt)
        norm = gpt.decoder.final_layernorm
        self.norm = LeanNorm.of(norm) if is_lean_norm(norm) else norm  # None, or Transformer Engine's
        self.projection = lean_linear(gpt.output_weight(), None, dtype, weights)
        self.to_tokens = Readout(self.projection, self.rows)

    @property
    def bytes(self) -> int:
        """Of weights that a prediction reads."""
        return self.projection.bytes

    def predict(self, x: Tensor) -> Prediction:
        """From the last layer's output [N, H]. Collectives: see `Prediction.from_summary`."""
        x = x if self.norm is None else self.norm(x)
        return self.to_tokens.predict(x.to(self.dtype))


class Readout:
    """Predictions of a projection.

    Args:
        projection: [R, H] without bias.
        rows: what its rows stand for.
        bucket: weight [H] and bias [1] of one more logit, on ranks that have it.
    """

    def __init__(self, projection: DenseLinear, rows: Rows, bucket: Sequence[Tensor] = ()):
        self._projection, self._rows, self._bucket = projection, rows, bucket
        if projection.kernels:
            parts = [part.flatten() for part in bucket] or [projection.weight.new_empty(0)]
            self._joined = torch.cat(parts).numpy()

    def predict(self, state: Tensor) -> Prediction:
        """From states [N, H]. Collectives: see `Prediction.from_summary`."""
        return Prediction.from_summary(*self.summarised(state), self._rows)

    def summarised(self, state: Tensor) -> tuple[Tensor, RowSummary]:
        """Logits [N, R], and one more with a bucket, and their summary, of this rank."""
        emittable = self._rows.emittable
        for limit, kernel in self._projection.kernels:
            if len(state) <= limit:
                return run_readout(kernel, self._joined, emittable, state)
        logits = self._projection(state).contiguous()
        if emittable < self._rows.count:
            logits[:, emittable:].fill_(float("-inf"))
        if self._bucket:
            weight, bias = self._bucket
            logits = torch.cat([logits, linear(state, weight[None], bias)], dim=-1)
        return logits, summarise_rows(logits, emittable)
