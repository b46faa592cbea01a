# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Exit heads, the final exit and the embedding as functions of their weights, for decoding.

Suffixes: T tokens, N tokens to predict after, H hidden size, R rows of this tensor-parallel rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.nn.functional import linear

from nemo_ee.decoding.cpu.cpu_kernels import kernel_norm, run_head
from nemo_ee.decoding.cpu.kernels.readout import Head
from nemo_ee.decoding.cpu.lean_weights import DenseLinear, EightBitLinear, Int8Linear, lean_linear
from nemo_ee.decoding.cpu.output_search import OutputSearch
from nemo_ee.decoding.layers.lean_layer import ACTIVATIONS, LeanMLP
from nemo_ee.decoding.layers.lean_modules import is_lean_mlp, is_lean_norm, read_norm
from nemo_ee.decoding.prediction import Prediction, Rows
from nemo_ee.modeling.gpt import EarlyExitGPTModel
from nemo_ee.modeling.heads import ExitHead


class Readout(ABC):
    """Predictions from hidden states; passes of few tokens on a CPU go through our kernel.

    Args:
        projection: [R, H] without bias.
        rows: what its rows stand for.
        bucket: weight [H] and bias [1] of one more logit, on ranks that have it.
        dtype: to compute in.

    Attributes:
        kernels: for passes of at most so many tokens, ascending; none where torch computes.
    """

    def __init__(self, projection: DenseLinear, rows: Rows, bucket: Sequence[Tensor], dtype: torch.dtype):
        self.projection, self.rows, self.dtype = projection, rows, dtype
        self._alone = parallel_state.get_tensor_model_parallel_world_size() == 1
        self._bucket = [part.detach().to(dtype) for part in bucket]
        flat = [part.flatten() for part in self._bucket] or [torch.empty(0, dtype=dtype)]
        self.kernels: list[tuple[int, Head]] = []
        self._kernels_are_whole = False  # they read hidden states; else what `state` makes of these
        if projection.kernels:
            names = torch.empty(0, dtype=torch.long) if rows.tokens is None else rows.tokens
            extra = torch.cat(flat).numpy(), names.numpy()
            self.kernels = [(limit, Head.plain(part, *extra)) for limit, part in projection.kernels]

    @property
    def whole_kernels(self) -> list[tuple[int, Head]]:
        """`kernels` where these read hidden states and say all that there is to say, on this rank alone; else none."""
        return self.kernels if self._kernels_are_whole and self._alone else []

    @abstractmethod
    def state(self, x: Tensor) -> Tensor:
        """What the projection reads, [N, H] -> [N, H]. Collectives: an MLP's."""

    def logits(self, x: Tensor) -> Tensor:
        """[N, R] of this rank, and one more with a bucket, from hidden states [N, H]; padding at -inf. Collectives: an
        MLP's."""
        return self._logits(self.state(x))

    def predict(self, x: Tensor) -> Prediction:
        """From hidden states [N, H]. Collectives: an MLP's; see also `Prediction.from_summary`."""
        kernel = next((head for limit, head in self.kernels if len(x) <= limit), None)
        if kernel is None or not self._kernels_are_whole:
            x = self.state(x)
        elif x.dtype != self.dtype:
            x = x.to(self.dtype)
        if kernel is None:
            return Prediction.from_logits(self._logits(x), self.rows)
        answer = run_head(kernel, self.rows.emittable, x)
        if self._alone:
            return Prediction(self.rows, answer.logits, answer.tokens, answer.confidence)
        return Prediction.from_summary(answer.logits, answer.summary, self.rows)

    def _logits(self, state: Tensor) -> Tensor:
        """[N, R] of this rank, and one more with a bucket."""
        logits = self.projection(state).contiguous()
        if self.rows.emittable < self.rows.count:
            logits[:, self.rows.emittable :].fill_(float("-inf"))
        if not self._bucket:
            return logits
        weight, bias = self._bucket
        return torch.cat([logits, linear(state, weight[None], bias)], dim=-1)


class LeanHead(Readout):
    """An exit head behind its block; see `ExitHead.readout` and `ExitProjection.local_logits`.

    Args:
        head: the modules.
        output_weight: the backbone's [Vp/TP, H], for a tied projection.
        dtype: to compute in.
        weights: see `WEIGHT_KINDS`.
    """

    def __init__(self, head: ExitHead, output_weight: Tensor, dtype: torch.dtype, weights: str):
        projection = head.projection
        weight = output_weight if projection.weight is None else projection.weight
        bucket = (projection.bucket_weight, projection.bucket_bias) if projection.holds_bucket else ()
        rows = Rows.of_exit(projection)
        super().__init__(lean_linear(weight, None, dtype, weights), rows, bucket, dtype)
        self.norm = None if head.norm is None else read_norm(head.norm)
        self.mlp_norm = self.mlp = self.linear = None
        if head.mlp is not None:
            assert is_lean_mlp(head.mlp.norm, head.mlp.mlp), "exit heads are built of torch modules"
            self.mlp_norm = read_norm(head.mlp.norm)
            self.mlp = LeanMLP(head.mlp.mlp, dtype, weights)
        if head.linear is not None:
            self.linear = lean_linear(head.linear.weight, head.linear.bias, dtype, weights)
        if self.mlp is None or self.mlp.has_kernels:
            self.kernels = [(limit, self._with_parts(n)) for n, (limit, _) in enumerate(self.kernels)]
            self._kernels_are_whole = True

    def _with_parts(self, n: int) -> Head:
        """The n-th kernel with what stands before the projection."""
        head = self.kernels[n][1]._replace(norm=kernel_norm(self.norm, self.dtype))
        if self.linear is not None:
            head = head._replace(linear=self.linear.kernels[n][1])
        if self.mlp is None:
            return head
        return head._replace(
            mlp_norm=kernel_norm(self.mlp_norm, self.dtype),
            up=self.mlp.up.kernels[n][1],
            down=self.mlp.down.kernels[n][1],
            gated=self.mlp.gated,
            activation=ACTIVATIONS[self.mlp.activation],
        )

    @property
    def in_eight_bits(self) -> bool:
        """Whether all its matrices are read in 8 bits, whatever the number of tokens."""
        return isinstance(self.projection, EightBitLinear)

    @property
    def bytes(self) -> int:
        """Of weights that a prediction reads."""
        linears = [self.projection, self.linear]
        if self.mlp is not None:
            linears += [self.mlp.up, self.mlp.down]
        return sum(part.bytes for part in linears if part is not None)

    def state(self, x: Tensor) -> Tensor:
        """See `Readout`; [N, H] behind the block."""
        x = x.to(self.dtype)
        if self.linear is None:
            if self.mlp is not None:
                x = self.mlp.onto(x, self.mlp_norm(x))
            return x if self.norm is None else self.norm(x)
        state = self.linear(x if self.norm is None else self.norm(x))
        return state if self.mlp is None else self.mlp.onto(state, self.mlp_norm(x))


class LeanOutput(Readout):
    """The final norm and the output layer.

    Args:
        gpt: the last pipeline stage.
        dtype: to compute in.
        weights: see `WEIGHT_KINDS`.
    """

    def __init__(self, gpt: EarlyExitGPTModel, dtype: torch.dtype, weights: str):
        output = lean_linear(gpt.output_weight(), None, dtype, weights)
        super().__init__(output, Rows.of_output_layer(gpt), (), dtype)
        norm = gpt.decoder.final_layernorm
        self.norm = read_norm(norm) if is_lean_norm(norm) else norm  # None, or of a kind of its own
        if self.norm is None or is_lean_norm(norm):
            self.kernels = [
                (limit, head._replace(norm=kernel_norm(self.norm, dtype))) for limit, head in self.kernels
            ]
            self._kernels_are_whole = True

    @property
    def bytes(self) -> int:
        """Of weights that a prediction reads."""
        return self.projection.bytes

    def state(self, x: Tensor) -> Tensor:
        """See `Readout`; [N, H] behind the last layer."""
        x = x if self.norm is None else self.norm(x)
        return x.to(self.dtype)

    @property
    def can_be_searched(self) -> bool:
        """Whether `SearchedOutput` knows it: through our kernels, whole on this rank, behind RMSNorm or no norm, and
        not in 8 bits itself."""
        plain = self.norm is None or (self.norm.rms and self.norm.bias is None)
        return bool(self.whole_kernels) and plain and not isinstance(self.projection, Int8Linear)


class SearchedOutput:
    """The final exit where nobody asks for more than its most probable tokens: they are found by 8-bit weights, at a
    quarter of float32's bytes, and are the output layer's own all the same.

    What is not proven, and passes of many tokens, the output layer computes. Logits are its own, if they are asked
    for; confidences are by the 8-bit weights, approximate.

    Args:
        output: that `can_be_searched`.

    Attributes:
        output: as given.
        search: by the 8-bit weights.
        bytes: of weights that a prediction reads.
    """

    def __init__(self, output: LeanOutput):
        self.output, self.search = output, OutputSearch(output.projection, output.norm, output.dtype)
        self.rows, self.dtype, self.bytes = output.rows, output.dtype, self.search.bytes

    def predict(self, x: Tensor) -> Prediction:
        """From hidden states [N, H]."""
        found = None
        if len(x) <= self.search.limit:
            found = self.search(self.rows.emittable, x if x.dtype == self.dtype else x.to(self.dtype))
        if found is None:
            return self.output.predict(x)
        return Prediction(self.rows, lambda: self.output.predict(x).logits, *found)
