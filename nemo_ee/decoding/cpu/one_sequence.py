# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A step of one sequence, or a round's end, through our CPU kernels and nothing else: what `EarlyExitDecoder.step` and
`flush` do, without torch.

A pass drives Python's and torch's code out of the processor's caches, so that each of torch's operations takes 20 to
100 microseconds; a token that asks two exits makes some fifty. Here it makes one per segment and head: a kernel's.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nemo_ee.decoding.confidence_rules import ConfidenceRule, max_probability
from nemo_ee.decoding.cpu.cpu_kernels import KERNEL_TOKENS, head_arrays
from nemo_ee.decoding.cuda.segment_graphs import EagerPasses
from nemo_ee.decoding.decoding_memory import DecodingMemory
from nemo_ee.decoding.decoding_model import DecodingModel
from nemo_ee.decoding.layers.lean_head import Readout, SearchedOutput
from nemo_ee.decoding.leaving import is_asked, leaves
from nemo_ee.decoding.pass_prices import PassPrices
from nemo_ee.decoding.prediction import Prediction
from nemo_ee.decoding.step import Part, Step

Said = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""[N] tokens, [N] confidences and [N, R] logits, None where nobody asks for them."""


class Progress(Protocol):
    """What a decoder has fed so far, see `EarlyExitDecoder`."""

    filled: list[list[int]]
    layers_run: list[int]
    prices: PassPrices
    spent: float


class OneSequence:
    """Steps of one sequence, where `fits`.

    Args:
        model: all of whose parts go through our kernels, see `made`.
        memory: of the decoder.
        exit_layers: of the decoder, ascending.
    """

    def __init__(self, model: DecodingModel, memory: DecodingMemory, exit_layers: Sequence[int]):
        self._model, self._memory = model, memory
        self._layers = [*exit_layers, model.final_layer]
        self._embedding = model.embedding_rows.numpy()
        self._hidden = [memory.hidden[n].numpy() for n in exit_layers]
        self._positions = np.arange(len(memory.table.positions))

    @classmethod
    def made(
        cls,
        model: DecodingModel,
        passes: EagerPasses,
        exit_layers: Sequence[int],
        policy: str,
        rule: ConfidenceRule,
    ) -> "OneSequence | None":
        """For a decoder with these; None where some part of it needs torch."""
        memory, output, rows = passes.memory, model.output, model.embedding_rows
        if type(passes) is not EagerPasses or policy != "catch_up" or rule.confidence is not max_probability:
            return None
        if rows is None or rows.device.type != "cpu" or not rows.dtype == model.hidden.dtype == model.dtype:
            return None
        heads = [model.heads[n] for n in exit_layers]
        if any(memory.blocks[n] is not None or model.heads[n].dtype != model.dtype for n in exit_layers):
            return None
        if output is None or not all(head.whole_kernels for head in [*heads, output]):
            return None
        whole = memory.segment(0, model.final_layer).kernels
        return cls(model, memory, exit_layers) if whole else None

    def fits(self, progress: Progress, row: int) -> bool:
        """Whether the sequence's next step has no pass of too many tokens, whichever exits it asks."""
        return progress.filled[0][row] + 1 - progress.filled[-1][row] <= KERNEL_TOKENS

    def step(
        self,
        progress: Progress,
        row: int,
        token: int,
        thresholds: Sequence[float],
        most_pending: int | None,
        hold: int | None,
        greedy: bool,
    ) -> Step:
        """See `EarlyExitDecoder.step`; the arguments are those of the one sequence."""
        filled, answer = progress.filled, Step.unanswered(1)
        begin = start = filled[0][row]
        x, first = self._embedding[token : token + 1], 0
        for k, threshold in enumerate(thresholds):
            asked = is_asked(threshold)
            if not (asked or hold == k) and filled[k + 1][row] == begin:
                continue
            x, first = self._run(progress, row, first, k, x, begin), k + 1
            behind = filled[k + 1][row]
            if asked and (most_pending is None or filled[k][row] - behind <= most_pending):
                head = self._model.heads[self._layers[k]]
                said = ask(head, x[-1:])
                progress.spent += progress.prices.head(self._layers[k], 1)
                if leaves(float(said[1][0]), threshold):
                    return self._answered(answer, self._layers[k], head, said, x[-1:])
            if hold == k:
                return answer
            if behind != begin:
                begin, x = behind, self._hidden[k][row, behind : start + 1]
        x = self._run(progress, row, first, len(thresholds), x, begin)
        output, said = self._finally(progress, x[-1:], greedy)
        return self._answered(answer, self._layers[-1], output, said, x[-1:])

    def flush(self, progress: Progress, row: int, greedy: bool) -> tuple[Prediction, list[int]]:
        """See `EarlyExitDecoder.flush`, of the one sequence."""
        filled, k = progress.filled, 0
        while filled[k][row] == filled[k + 1][row]:
            k += 1
        while k < len(self._hidden):
            begin, end, last = filled[k + 1][row], filled[k][row], k + 1
            while last < len(self._hidden) and filled[last + 1][row] == begin:
                last += 1
            x, k = self._run(progress, row, k + 1, last, self._hidden[k][row, begin:end], begin), last
        output, said = self._finally(progress, x, greedy)
        return _prediction(output, said, x), [len(x)]

    def layers(self, low: int, high: int, x: np.ndarray, row: int, begin: int) -> np.ndarray:
        """Layers low + 1 to high (see `DecodingMemory.segment`) on some tokens [T, H] of the sequence in a row, from a
        position on; returns [T, H]."""
        count = len(x)
        places = np.full(count, row), self._positions[begin : begin + count]
        for kernels, rotates in self._memory.segment(low, high).kernels or ():
            kernel = next(kernel for limit, kernel in kernels if count <= limit)
            x = kernel.run(x, places, self._memory.table.rotation(self._model.dtype, rotates))
        return x

    def _run(
        self, progress: Progress, row: int, first: int, last: int, x: np.ndarray, begin: int
    ) -> np.ndarray:
        """Segments from the first to the last one, on the sequence's tokens from a position on."""
        low, high, count = self._layers[first - 1] if first else 0, self._layers[last], len(x)
        x = self.layers(low, high, x, row, begin)
        progress.spent += progress.prices.segment(low, high, count)
        for k in range(first, last + 1):
            progress.filled[k][row] = begin + count
        progress.layers_run[row] += count * (high - low)
        return x

    def _finally(
        self, progress: Progress, x: np.ndarray, greedy: bool
    ) -> tuple[Readout | SearchedOutput, Said]:
        """The final exit, and what it says about [N, H]."""
        output = self._model.greedy_output if greedy else self._model.output
        assert output is not None, "the whole model"
        progress.spent += (progress.prices.greedy if greedy else progress.prices).output(len(x))
        return output, ask(output, x)

    @staticmethod
    def _answered(
        answer: Step, layer: int, head: Readout | SearchedOutput, said: Said, x: np.ndarray
    ) -> Step:
        """With what a head says about [1, H]."""
        token, sure, _ = said
        answer.add(layer, Part([0], _prediction(head, said, x), [0]), sure.tolist(), token.tolist())
        return answer


def _prediction(head: Readout | SearchedOutput, said: Said, x: np.ndarray) -> Prediction:
    """What a head says about [N, H]."""
    token, sure, logits = said

    def whole() -> Tensor:
        if logits is not None:
            return torch.from_numpy(logits)
        assert isinstance(head, SearchedOutput), "others compute them"
        return head.output.predict(torch.from_numpy(x)).logits

    return Prediction(head.rows, whole, *map(torch.from_numpy, (token, sure)))


def ask(head: Readout | SearchedOutput, x: np.ndarray) -> Said:
    """What a head says about [N, H], N at most `KERNEL_TOKENS`."""
    if isinstance(head, SearchedOutput):
        found = head.search.arrays(head.rows.emittable, x) if len(x) <= head.search.limit else None
        if found is not None:
            return *found, None
        head = head.output
    kernel = next(kernel for limit, kernel in head.whole_kernels if len(x) <= limit)
    logits, token, sure, *_ = head_arrays(kernel, head.rows.emittable, x)
    return token, sure, logits
