# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Prices of passes, measured in well under a second on the machine and the weights that decode."""

import time
from collections.abc import Callable
from functools import partial
from operator import gt
from pathlib import Path

import torch
from megatron.core import parallel_state

from nemo_ee.decoding.confidence_rules import CONFIDENCE_RULES
from nemo_ee.decoding.cpu.one_sequence import OneSequence, ask
from nemo_ee.decoding.cuda.captured_decoding import passes_for
from nemo_ee.decoding.decoding_model import DecodingModel
from nemo_ee.decoding.exit_point import ExitPoint
from nemo_ee.decoding.layers.lean_head import LeanOutput, SearchedOutput
from nemo_ee.decoding.layers.packed_tokens import PackedTokens
from nemo_ee.decoding.pass_prices import PassPrices, read_prices
from nemo_ee.decoding.transfer import to_device, to_host
from nemo_ee.runtime.collective import on_first_rank

TOKENS = (1, 2, 4, 5, 8, 9, 16)
"""Of the passes that are measured. Our CPU kernels take four tokens at a time, so that five cost a step more, and the
output layer is searched for at most eight."""
SECONDS = 0.5
"""That measuring takes, about."""
ROUNDS = 2, 6
"""How often each pass is measured, at least and at most. The fastest counts: other work only slows a pass down."""
PASS_SECONDS = 0.02
"""Of a pass of one token that is measured: through as many layers as that takes, of layers that cost the same."""
ROWS, POSITIONS, BEFORE = max(TOKENS), 48, 24
"""Of the caches, where none are prepared; tokens that a sequence has already."""


def measured_prices(model: DecodingModel) -> PassPrices:
    """Times passes of the model as decoding makes them. Call it as they are made: under `generating`.

    All tensor-parallel ranks get the first one's numbers, rounded to three digits. Collectives: the passes' own, and
    broadcasts of a few numbers.

    Args:
        model: the whole model, on one pipeline stage; what it has captured is used if nobody has borrowed it.
    """
    exits = sorted(model.heads)
    captured = model.captured
    rows, positions = (ROWS, POSITIONS) if captured is None else (captured.rows, captured.max_length)
    passes = passes_for(model, exits, rows, positions)
    try:
        return _Measurement(model, passes, exits, rows, min(BEFORE, positions // 2)).prices()
    finally:
        passes.give_back()


def prices_for(model: DecodingModel, file: str | None) -> PassPrices:
    """`measured_prices`, or what a file says of them; a file that is not there is written.

    All ranks of the model call it.

    Args:
        model: see `measured_prices`.
        file: JSON; None always measures.

    Raises:
        ConfigError: see `read_prices`.
        OutputError: it cannot be written.
    """

    of = model.final_layer, sorted(model.heads), model.weights, model.output_kind
    found = on_first_rank(lambda: read_prices(file, *of), _group())
    if found is None:
        found = measured_prices(model)
        if file is not None:
            on_first_rank(lambda: found.write(Path(file)), _group())
    return found


def _group() -> torch.distributed.ProcessGroup | None:
    return parallel_state.get_tensor_model_parallel_group() if torch.distributed.is_initialized() else None


class _Measurement:
    """Passes on caches of so many rows."""

    def __init__(self, model: DecodingModel, passes, exits: list[int], rows: int, before: int):
        self._model, self._passes, self._exits = model, passes, exits
        table = passes.memory.table
        self._most = min(len(table.positions) - before - 1, max(TOKENS)) * rows
        self._pack = partial(_pack, table, rows=rows, before=before)
        self._packs = {n: self._pack(n) for n in TOKENS if n <= self._most}
        rule = CONFIDENCE_RULES["max_probability"]
        self._points = [ExitPoint(model, n, rule, passes) for n in exits]
        self._states = {n: self._embed(pack) for n, pack in self._packs.items()}
        # The output layer's are from behind the last layer: how long it is searched depends on them.
        self._last = {
            n: passes.run(0, model.final_layer, self._states[n], pack).clone()
            for n, pack in self._packs.items()
        }
        self._alone = OneSequence.made(model, passes, exits, "catch_up", rule)
        self._row, self._begin = 0, before

    def prices(self) -> PassPrices:
        model, layers = self._model, self._model.final_layer
        deep, shallow = self._depths()
        assert model.output is not None and model.greedy_output is not None
        searches = model.greedy_output is not model.output
        work: dict[tuple[str, int, int], Callable[[], object]] = {}
        for n in self._packs:
            work["layers", deep, n] = self._layers(deep, n)
            work["layers", shallow, n] = self._layers(shallow, n)
            work["output", 0, n] = self._output(model.output, n)
            if searches:
                work["output", 1, n] = self._output(model.greedy_output, n)
            work |= {("head", point.layer, n): self._head(point, n) for point in self._points}
        # In a step the weights of layers drive all else out of the processor's caches.
        seconds = self._fastest(work, between=self._layers(shallow, 1))
        counts = tuple(self._packs)

        def row(kind: str, which: int) -> list[float]:
            return _ascending([seconds[kind, which, n] for n in counts])

        long, short = row("layers", deep), row("layers", shallow)
        each = _ascending(
            [(a - b) / (deep - shallow) if a > b else a / deep for a, b in zip(long, short, strict=True)]
        )
        start = [max(0.0, whole - deep * layer) for layer, whole in zip(each, long, strict=True)]
        return PassPrices(
            num_layers=layers,
            tokens=counts,
            start=_rounded(start),
            layer=_rounded(each),
            output_layer=_rounded(row("output", 0)),
            greedy_output=_rounded(row("output", int(searches))),
            exits=tuple(self._exits),
            heads=tuple(_rounded(row("head", n)) for n in self._exits),
            weights=model.weights,
            output_kind=model.output_kind,
            source=f"measured: {model.device.type}, {torch.get_num_threads()} threads, {model.dtype}",
        )

    def _depths(self) -> tuple[int, int]:
        """Through how many layers passes are timed: all cost the same, and starting a pass is extra."""
        layers = self._model.final_layer
        if self._model.captured is not None:  # captures are cut at exits
            return layers, min([n for n in self._exits if n < layers], default=layers)
        few = min(4, layers)
        seconds = self._fastest({"few": self._layers(few, 1)}, (2, 2))["few"]
        deep = min(layers, max(few, int(few * PASS_SECONDS / seconds)))
        return deep, max(1, deep // 8)

    def _fastest(
        self, work: dict, rounds: tuple[int, int] = ROUNDS, between: Callable = lambda: None
    ) -> dict:
        """Seconds of each, the least of some rounds; in a round all take turns, after a call of `between`."""
        fastest = dict.fromkeys(work, float("inf"))
        begin = time.perf_counter()
        for done in range(rounds[1] + 1):
            for key, function in work.items():
                between()
                seconds = self._timed(function)
                if done:  # the first one warms up
                    fastest[key] = min(fastest[key], seconds)
            after_next = (time.perf_counter() - begin) * (done + 2) / (done + 1)
            if on_first_rank(partial(gt, after_next, SECONDS), _group()) and done >= rounds[0]:
                break
        return on_first_rank(lambda: fastest, _group())

    def _timed(self, function: Callable) -> float:
        """Seconds; on a CPU no more than all threads have computed together: waiting for a core does not count."""
        self._wait()
        begin, computed = time.perf_counter(), time.process_time()
        function()
        self._wait()
        took, computed = time.perf_counter() - begin, time.process_time() - computed
        return took if self._model.device.type == "cuda" else min(took, computed)

    def _wait(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize()

    def _embed(self, pack: PackedTokens) -> torch.Tensor:
        tokens = to_device(list(range(1, pack.tokens + 1)), self._model.device)
        return self._model.embed(tokens, pack.positions)

    def _layers(self, high: int, n: int) -> Callable:
        if n == 1 and (alone := self._alone) is not None:
            return lambda: alone.layers(0, high, self._states[n].numpy(), self._row, self._begin)
        return lambda: self._passes.run(0, high, self._states[n], self._packs[n])

    def _head(self, point: ExitPoint, n: int) -> Callable:
        if n == 1 and self._alone is not None:
            return lambda: ask(point.head, self._states[n].numpy())

        def answer() -> None:
            inside = point.enter_block(self._states[n], self._packs[n])
            point.predict(self._states[n], inside, list(range(n)), None)
            point.pending(self._pack(n))  # what goes on is packed anew

        return answer

    def _output(self, output: LeanOutput | SearchedOutput, n: int) -> Callable:
        if n == 1 and self._alone is not None:
            return lambda: ask(output, self._last[n].numpy())

        def answer() -> None:
            prediction = self._passes.predict("the final exit", output, self._last[n])
            to_host(prediction.confidence, prediction.tokens)

        return answer


def _pack(table, tokens: int, *, rows: int, before: int) -> PackedTokens:
    """So many tokens of as many sequences as there are, several of each where there are fewer."""
    used = min(tokens, rows)
    counts = [tokens // used + (row < tokens % used) for row in range(used)]
    return PackedTokens(table, list(range(used)), [before] * used, counts)


def _ascending(seconds: list[float]) -> list[float]:
    """No more for some tokens than for more of them: what took longer was held up by something else."""
    return [min(seconds[n:]) for n in range(len(seconds))]


def _rounded(values: list[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.3g}") for value in values)
