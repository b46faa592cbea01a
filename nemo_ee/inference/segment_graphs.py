# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""CUDA graphs of a decoder's segments and exits, for passes of one new token per sequence.

Launching a layer's operations one by one takes longer than running them for a few tokens. A graph launches a
whole segment at once. Its shapes are fixed, so passes are padded: to 1, 2, 4, … sequences, and to 128, 256,
512, … keys looked at. Padding reads what other sequences' keys happen to be and writes to the spare position
(see `static_positions`), which nothing reads.

A decoder's graphs hold the addresses of its caches, so they live and die with it. Capturing one costs several
passes, and `generate` makes a decoder per call: hence a shape runs eagerly `EAGER_PASSES` times before it is
captured. Short texts are never captured; a server, whose decoder lives as long as itself, captures each shape
once.

Suffixes: N sequences of a pass, T tokens, H hidden size.
"""

from collections import Counter
from collections.abc import Callable

import torch
from nemo.utils import logging
from nemo.utils.nemo_logging import LogMode
from torch import Tensor

from nemo_ee.megatron.cuda_capture import Capture, CapturedPass, CudaCapture, Pass
from nemo_ee.megatron.decode import PackedTokens, PositionTable
from nemo_ee.megatron.decoding_model import DecodingModel
from nemo_ee.megatron.lean_head import LeanHead, LeanOutput
from nemo_ee.megatron.lean_layer import LeanLayer
from nemo_ee.megatron.prediction import Prediction
from nemo_ee.megatron.static_tokens import StaticTokens

EAGER_PASSES = 8
"""So often a shape runs eagerly before it is captured."""
FEWEST_KEYS = 128
"""Keys that a captured pass looks at, at least; more in powers of two."""

Part = Callable[[Tensor, PackedTokens], Tensor]
"""Layers: from the states [T, H] of a pack's tokens to those behind them; caches are filled on the way."""


def capture_for(model: DecodingModel) -> Capture | None:
    """How a decoder of the model captures its passes; None where it runs all of them eagerly.

    On a GPU an obstacle is named in a warning, once per process.
    """
    if not model.cuda_graphs or model.device.type != "cuda":
        return None
    tensor_parallel = model.gpt.config.tensor_model_parallel_size
    mathematics = [*model.layers.values(), *model.blocks.values()]
    if tensor_parallel > 1:
        _warn(f"tensor_model_parallel_size={tensor_parallel}, and collectives are not captured")
    elif not all(isinstance(layer, LeanLayer) for layer in mathematics):
        _warn("some layer has modules whose weights decoding does not read (FP8, experts, …)")
    else:
        return CudaCapture(model.device)
    return None


class SegmentGraphs:
    """Runs parts of a model, by replaying captured passes where these have the shape.

    Results are the caller's own: nothing that the next replay overwrites is handed out. A part that cannot be
    captured is named in a warning; from then on everything runs eagerly, that pass included.

    Args:
        capture: see `capture_for`; None runs everything eagerly.
        table: positions of the caches, `static_positions` of them where passes are captured.
        rows: sequences that fit.
    """

    def __init__(self, capture: Capture | None, table: PositionTable, rows: int):
        self._capture, self._table, self._rows = capture, table, rows
        self._most_keys = len(table.positions) - 1
        self._seen: Counter[tuple] = Counter()
        self._captured: dict[tuple, CapturedPass] = {}
        self._inputs: dict[int, _Inputs] = {}

    def run(self, name: str, part: Part, x: Tensor, packed: PackedTokens) -> Tensor:
        """`part(x, packed)`.

        Args:
            name: of the part, the same in all its calls.
            part: what to run.
            x: [T, H].
            packed: the tokens.
        """
        if self._capture is None or packed.width > 1:
            return part(x, packed)
        inputs, keys = self._inputs_for(packed.sequences), self._keys(packed.length)
        states = inputs.states_like(x)

        def static_pass() -> tuple[Tensor]:
            tokens = StaticTokens(self._table, inputs.index, keys, packed.first_rows)
            return (part(states, tokens),)

        captured = self._ready((name, len(states), keys, packed.first_rows), inputs, static_pass)
        if captured is None:
            return part(x, packed)
        inputs.load(packed)
        states[: len(x)] = x
        captured.replay()
        return captured.outputs[0][: len(x)].clone()

    def predict(self, name: str, head: LeanHead | LeanOutput, x: Tensor) -> Prediction:
        """`head.predict(x)`.

        Args:
            name: of the exit, the same in all its calls.
            head: an exit's, or the final exit.
            x: [N, H].
        """
        if self._capture is None or len(x) > self._rows:
            return head.predict(x)
        inputs = self._inputs_for(len(x))
        states = inputs.states_like(x)

        def static_pass() -> tuple[Tensor, Tensor, Tensor]:
            prediction = head.predict(states)
            return prediction.logits, prediction.tokens, prediction.confidence

        captured = self._ready((name, len(states)), inputs, static_pass)
        if captured is None:
            return head.predict(x)
        states[: len(x)] = x
        captured.replay()
        return Prediction(head.rows, *(output[: len(x)].clone() for output in captured.outputs))

    def _inputs_for(self, sequences: int) -> "_Inputs":
        size = min(_power_of_two(sequences), self._rows)
        if size not in self._inputs:
            self._inputs[size] = _Inputs(size, self._most_keys, self._table.positions.device)
        return self._inputs[size]

    def _keys(self, length: int) -> int:
        return min(max(_power_of_two(length), FEWEST_KEYS), self._most_keys)

    def _ready(self, shape: tuple, inputs: "_Inputs", static_pass: Pass) -> CapturedPass | None:
        """The captured pass; None before a shape was seen often enough, and for good after a failure."""
        if shape not in self._captured:
            assert self._capture is not None, "asked for passes to capture only"
            self._seen[shape] += 1
            if self._seen[shape] <= EAGER_PASSES:
                return None
            inputs.clear()  # whatever the capture runs writes to the spare position only
            try:
                self._captured[shape] = self._capture(static_pass)
            except RuntimeError as error:
                cause = error.__context__ or error  # a failed capture hides its cause behind its own end
                _warn(f"capturing {shape[0]} failed ({cause})")
                self._capture = None
                self._captured.clear()
                self._inputs.clear()
                return None
        return self._captured[shape]


class _Inputs:
    """What captured passes of N sequences read.

    Args:
        size: N, padding included.
        spare: the position that padding writes to, in row 0.
        device: where they are.

    Attributes:
        index: [2, N] rows and positions.
    """

    def __init__(self, size: int, spare: int, device: torch.device):
        self.index = torch.zeros(2, size, dtype=torch.long, device=device)
        self._size, self._spare = size, spare
        self._states: dict[torch.dtype, Tensor] = {}
        self._loaded: PackedTokens | None = None
        self.clear()

    def states_like(self, x: Tensor) -> Tensor:
        """[N, H] of the dtype of x [..., H]; padding keeps what earlier passes have read."""
        if x.dtype not in self._states:
            self._states[x.dtype] = x.new_zeros(self._size, x.shape[-1])
        return self._states[x.dtype]

    def clear(self) -> None:
        """Makes all sequences padding."""
        self.index[0] = 0
        self.index[1] = self._spare
        self._loaded = None

    def load(self, packed: PackedTokens) -> None:
        """Makes the first sequences those of a pack of one token each, the others padding."""
        if packed is not self._loaded:
            padding = self._size - packed.sequences
            index = [packed.rows + [0] * padding, packed.starts + [self._spare] * padding]
            self.index.copy_(torch.tensor(index), non_blocking=True)
            self._loaded = packed


def _power_of_two(count: int) -> int:
    """The smallest that is not below `count`."""
    return 1 << (count - 1).bit_length()


def _warn(obstacle: str) -> None:
    logging.warning(
        f"decoding runs without CUDA graphs, slower for few sequences: {obstacle}; "
        "prepare_decoding(cuda_graphs=False) does not try",
        mode=LogMode.ONCE,
    )
