# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A decoder's passes through layers, blocks and heads: eagerly, or by CUDA graphs that were captured once.

Launching a layer's operations one by one takes longer than running them for a few tokens. A graph launches a
whole segment at once. Its shapes are fixed, so passes are padded to 1, 2, 4, … tokens, whichever sequences they
are of: catching up and verifying drafts replay as well as passes of one token each. Padding writes to the spare
position (see `static_positions`), which nothing reads.

A graph holds the addresses of its caches, so it belongs to them, and both to the model (see
`nemo_ee.decoding.cuda.captured_decoding`). Layers are cut at all exits of the model, and parts that follow each other
are replayed one after the other: so which exits a call uses needs no graphs of its own.

Suffixes: N tokens to predict after, T tokens of a pack, H hidden size.
"""

import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from nemo_ee.decoding.cuda.cuda_capture import Capture, CapturedPass, CudaCapture, PassFunction
from nemo_ee.decoding.cuda.static_tokens import RowOrder, StaticTokens
from nemo_ee.decoding.decoding_memory import DecodingMemory
from nemo_ee.decoding.decoding_model import DecodingModel
from nemo_ee.decoding.layers.lean_head import LeanHead, LeanOutput, SearchedOutput
from nemo_ee.decoding.layers.lean_layer import LeanLayer
from nemo_ee.decoding.layers.packed_tokens import PackedTokens
from nemo_ee.decoding.prediction import Prediction

MOST_TOKENS = 64
"""Passes of at most so many tokens are captured, and of `TOKENS_PER_ROW` per row."""
TOKENS_PER_ROW = 8
"""Tokens of a sequence that pile up at an exit are rarely more; a pass has as many only if all its sequences do."""


def capture_for(model: DecodingModel) -> Capture | None:
    """How a model's passes are captured; None where all run eagerly.

    On a GPU an obstacle is named in a warning, once per process.
    """
    if model.device.type != "cuda":
        return None
    tensor_parallel = model.gpt.config.tensor_model_parallel_size
    mathematics = [*model.layers.values(), *model.blocks.values()]
    if tensor_parallel > 1:
        warn_of_eager(f"tensor_model_parallel_size={tensor_parallel}, and collectives are not captured")
    elif not model.is_whole:
        warn_of_eager("the model is on several pipeline stages, which send to each other between passes")
    elif not all(isinstance(layer, LeanLayer) for layer in mathematics):
        warn_of_eager("some layer has modules whose weights decoding does not read (FP8, experts, …)")
    else:
        return CudaCapture(model.device)
    return None


class EagerPasses:
    """Runs parts of a model on a memory.

    Args:
        memory: caches, and the layers that fill them.

    Attributes:
        memory: as given.
    """

    def __init__(self, memory: DecodingMemory):
        self.memory = memory

    def run(self, low: int, high: int, x: Tensor, packed: PackedTokens) -> Tensor:
        """Layers low + 1 to high (see `DecodingMemory.segment`) on the tokens of a pack, [T, H] -> [T, H]."""
        return self.memory.segment(low, high)(x, packed)

    def fill(self, low: int, high: int, x: Tensor, packed: PackedTokens) -> None:
        """Writes keys and values of layers low + 1 to high as if [T, H] were the input of each."""
        self.memory.segment(low, high).fill(x, packed)

    def run_block(self, n: int, x: Tensor, packed: PackedTokens) -> Tensor:
        """The block of the exit on layer n, [T, H] -> [T, H]."""
        block = self.memory.blocks[n]
        assert block is not None, "asked of exits with blocks only"
        return block(x, packed)

    def predict(self, name: str, head: LeanHead | LeanOutput | SearchedOutput, x: Tensor) -> Prediction:
        """`head.predict(x)`.

        Args:
            name: of the exit, for messages.
            head: an exit's, or the final exit.
            x: [N, H].
        """
        return head.predict(x)

    def give_back(self) -> None:
        """Says that the decoder that uses them is done."""


class CapturedPasses(EagerPasses):
    """Runs parts of a model by replaying captured passes; a shape is captured when it is met first.

    Results are the caller's own: nothing that the next replay overwrites is handed out. A part that cannot be
    captured, too little memory included, is named in a warning; from then on everything runs eagerly, that pass
    included. So do passes of more tokens than `most_tokens`.

    Args:
        capture: see `capture_for`.
        memory: with `static_positions`.

    Attributes:
        most_tokens: that a captured pass can have.
        replayed: passes so far, through layers, blocks and heads.
        eager: those that were not captured.
    """

    def __init__(self, capture: Capture, memory: DecodingMemory):
        super().__init__(memory)
        self.most_tokens = max(MOST_TOKENS, _power_of_two(TOKENS_PER_ROW * memory.rows))
        self.replayed = self.eager = 0
        self._capture: Capture | None = capture
        self._free = threading.Lock()
        self._most_keys = len(memory.table.positions) - 1
        self._captured: dict[Hashable, CapturedPass] = {}
        self._inputs: dict[int, _Inputs] = {}

    def lend(self) -> bool:
        """Empties the caches for another decoder; False while one uses them. Any thread."""
        if not self._free.acquire(blocking=False):
            return False
        self.memory.clear()
        return True

    def give_back(self) -> None:
        """See `EagerPasses`."""
        self._free.release()

    def all_shapes(
        self, heads: Mapping[int, LeanHead], output: LeanOutput, hidden: Tensor
    ) -> Iterator[Callable[[], CapturedPass | None]]:
        """What captures each part of the model in each shape that a decoder may ask for.

        Args:
            heads: exit layer -> head.
            output: the final exit.
            hidden: [..., H] an example of a hidden state.
        """
        blocks = self.memory.blocks
        examples = {n: hidden if blocks[n] is None else hidden.to(heads[n].dtype) for n in heads}
        parts = [(self._layers(*cut), hidden) for cut in self.memory.cuts()]
        parts += [(self._block(n), x) for n, x in examples.items() if blocks[n] is not None]
        readouts: list[tuple[str, LeanHead | LeanOutput, Tensor]] = [("the final exit", output, hidden)]
        readouts += [(f"exit {n}", heads[n], x) for n, x in examples.items()]
        for size in reversed(self.sizes):  # the largest first: the others fit into its memory
            inputs = self._inputs_for(size)
            for part, x in parts:
                for shape in self.memory.attention.shapes(size, self.memory.rows, self._most_keys):
                    yield partial(self._pass, part, inputs, x, *shape)
            for name, head, x in readouts:
                yield partial(self._prediction, name, head, inputs, x)

    def run(self, low: int, high: int, x: Tensor, packed: PackedTokens) -> Tensor:
        """See `EagerPasses`."""
        parts = [self._layers(*cut) for cut in self.memory.cuts(low, high)]
        out = self._replay(parts, x, packed)
        return super().run(low, high, x, packed) if out is None else out

    def fill(self, low: int, high: int, x: Tensor, packed: PackedTokens) -> None:
        """See `EagerPasses`."""
        parts = [
            (f"keys of layers {a + 1} to {b}", self.memory.segment(a, b).fill)
            for a, b in self.memory.cuts(low, high)
        ]
        if self._replay(parts, x, packed) is None:
            super().fill(low, high, x, packed)

    def run_block(self, n: int, x: Tensor, packed: PackedTokens) -> Tensor:
        """See `EagerPasses`."""
        out = self._replay([self._block(n)], x, packed)
        return super().run_block(n, x, packed) if out is None else out

    def predict(self, name: str, head: LeanHead | LeanOutput, x: Tensor) -> Prediction:
        """See `EagerPasses`."""
        captured = inputs = None
        if self._fits(len(x)):
            inputs = self._inputs_for(len(x))
            captured = self._prediction(name, head, inputs, x)
        if captured is None or inputs is None:
            self.eager += 1
            return super().predict(name, head, x)
        inputs.states_like(x)[: len(x)] = x
        captured.replay()
        self.replayed += 1
        return Prediction(head.rows, *(output[: len(x)].clone() for output in captured.outputs))

    def _layers(self, low: int, high: int) -> "_Part":
        return f"layers {low + 1} to {high}", self.memory.segment(low, high)

    def _block(self, n: int) -> "_Part":
        block = self.memory.blocks[n]
        assert block is not None, "asked of exits with blocks only"
        return f"the block of exit {n}", block

    def _replay(self, parts: Sequence["_Part"], x: Tensor, packed: PackedTokens) -> Tensor | None:
        """Parts one after the other, [T, H] -> [T, H]; None where they are not captured."""
        if not self._fits(len(x)):
            self.eager += len(parts)
            return None
        inputs, shape = self._inputs_for(len(x)), self.memory.attention.shape(packed, self._most_keys)
        # Before anything is loaded: what a capture runs leaves its marks in the inputs.
        captured = [self._pass(part, inputs, x, *shape) for part in parts]
        ready = [each for each in captured if each is not None]
        if len(ready) < len(parts):
            self.eager += len(parts)
            return None
        inputs.load(packed)
        states = inputs.states_like(x)
        states[: len(x)] = x
        for each in ready:
            each.replay()
        self.replayed += len(parts)
        return states[: len(x)].clone()

    def _fits(self, tokens: int) -> bool:
        return self._capture is not None and tokens <= self.most_tokens

    def _inputs_for(self, tokens: int) -> "_Inputs":
        size = min(size for size in self.sizes if size >= tokens)
        if size not in self._inputs:
            # Ordinary tensors, for decoding under no_grad as well as inference_mode.
            with torch.inference_mode(False):
                self._inputs[size] = _Inputs(size, self._most_keys, self.memory.table.positions.device)
        return self._inputs[size]

    @property
    def sizes(self) -> list[int]:
        """Tokens that captured passes have, ascending: powers of two, and one per row of the caches."""
        powers = {1 << n for n in range(self.most_tokens.bit_length())}
        return sorted(powers | {self.memory.rows})

    def _pass(
        self, part: "_Part", inputs: "_Inputs", x: Tensor, length: int, rows: RowOrder
    ) -> CapturedPass | None:
        """A part that reads its states [T, H] from the inputs and leaves its own there."""
        (name, function), states = part, inputs.states_like(x)

        def static_pass() -> tuple[Tensor, ...]:
            out = function(states, StaticTokens(self.memory.table, inputs.index, length, rows))
            if out.dtype != states.dtype:
                raise RuntimeError(f"states become {out.dtype} from {states.dtype}")
            if out is not states:
                states.copy_(out)
            return ()

        return self._ready(name, (name, inputs.size, x.dtype, length, rows), inputs, static_pass)

    def _prediction(
        self, name: str, head: LeanHead | LeanOutput, inputs: "_Inputs", x: Tensor
    ) -> CapturedPass | None:
        states = inputs.states_like(x)

        def static_pass() -> tuple[Tensor, ...]:
            prediction = head.predict(states)
            return prediction.logits, prediction.tokens, prediction.confidence

        return self._ready(name, (head, inputs.size, x.dtype), inputs, static_pass)

    def _ready(
        self, name: str, key: Hashable, inputs: "_Inputs", static_pass: PassFunction
    ) -> CapturedPass | None:
        """The captured pass; None, for good, after a failure."""
        if key not in self._captured and self._capture is not None:
            inputs.clear()  # whatever the capture runs writes to the spare position only
            try:
                self._captured[key] = self._capture(static_pass)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                cause = error.__context__ or error  # a failed capture hides its cause behind its own end
                warn_of_eager(f"capturing {name} failed ({cause})")
                self._capture = None
                self._captured.clear()
                self._inputs.clear()
        return self._captured.get(key)


_Part = tuple[str, Callable[[Tensor, PackedTokens], Tensor]]
"""A name, and layers: from the states [T, H] of a pack's tokens to those behind them; caches are filled on the way."""


class _Inputs:
    """What captured passes of T tokens read, and where their states are left.

    Args:
        size: T, padding included.
        spare: the position that padding writes to, in any row.
        device: where they are.

    Attributes:
        index: [2, T] rows and positions.
    """

    def __init__(self, size: int, spare: int, device: torch.device):
        self.index = torch.zeros(2, size, dtype=torch.long, device=device)
        self.size, self._spare = size, spare
        self._states: dict[torch.dtype, Tensor] = {}
        self._loaded: PackedTokens | None = None
        self.clear()

    def states_like(self, x: Tensor) -> Tensor:
        """[T, H] of the dtype of x [..., H]; padding keeps what earlier passes have left there."""
        if x.dtype not in self._states:
            with torch.inference_mode(False):
                self._states[x.dtype] = x.new_zeros(self.size, x.shape[-1])
        return self._states[x.dtype]

    def clear(self) -> None:
        """Makes all tokens padding."""
        self.index[0] = 0
        self.index[1] = self._spare
        self._loaded = None

    def load(self, packed: PackedTokens) -> None:
        """Makes the first tokens those of a pack, the others padding (of whatever rows)."""
        if packed is not self._loaded:
            packed.write_index(self.index)
            self.index[1, packed.tokens :] = self._spare
            self._loaded = packed


def _power_of_two(count: int) -> int:
    """The smallest that is not below `count`."""
    return 1 << (count - 1).bit_length()


@cache
def warn_of_eager(obstacle: str, remedy: str = "prepare_decoding(cuda_graphs=False) does not try") -> None:
    """Says once why decoding on a GPU runs without graphs, and what to do."""
    logging.getLogger(__name__).warning(
        "decoding runs without CUDA graphs, slower for few sequences: %s; %s", obstacle, remedy
    )
