# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Greedy tokens of a tiny model in float32, held to the CPU's.

The reference shares nothing with what is checked but the weights: another process, without a GPU, computes
every token anew from the whole text with the model's own forward (`tests.support.uncached`).
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import tiny
import torch
from result import Result

from tests.support.drafting import drafting_eagerly
from tests.support.uncached import generate_uncached

if TYPE_CHECKING:
    from part import Settings

TOKENS, END = 24, 0
EXITS = {2: 0.7, 4: 0.5, 6: 0.6}
"""Exit layer -> threshold, at which texts of these weights leave at every exit."""
WAYS: dict[str, dict | bool] = {
    "full depth": False,
    "exits": {"exits": list(EXITS), "threshold": list(EXITS.values())},
    "lossless": {"exits": list(EXITS), "threshold": list(EXITS.values()), "lossless": True},
}
MARGIN = 1e-4
"""Where the CPU's own decision, between two tokens or about a threshold, was nearer than that, a device's rounding
(1e-6 to 1e-5 in float32) may decide otherwise: texts are compared up to there."""
COMPARED = 0.9
"""Of all tokens, at least so many must come before such a place."""
NO_GRAPHS = "without CUDA graphs"
"""In the warning that decoding gives where it cannot capture."""


def prompts(quick: bool) -> list[list[int]]:
    """16 of 1 to 12 tokens; quick: 3."""
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(1, 13, (3 if quick else 16,), generator=generator).tolist()
    return [torch.randint(3, 201, (length,), generator=generator).tolist() for length in lengths]


def reference(settings: "Settings") -> dict[str, list[dict]]:
    """Texts of each way as the CPU computes them, tokens and margins. Lossless is full depth."""
    gpt = tiny.model().gpt
    texts = {}
    for name, exits in (("full depth", {}), ("exits", EXITS)):
        rows = [generate_uncached(gpt, prompt, TOKENS, exits) for prompt in prompts(settings.quick)]
        texts[name] = [ended(row.tokens, row.margins) for row in rows]
    return {**texts, "lossless": texts["full depth"]}


def ended(tokens: list[int], margins: list[float]) -> dict[str, list]:
    """A text up to its EOS."""
    length = tokens.index(END) + 1 if END in tokens else len(tokens)
    return {"tokens": tokens[:length], "margins": margins[:length]}


def check(settings: "Settings", result: Result) -> None:
    """All ways, batched and one by one, with CUDA graphs and without."""
    wait = settings.start_reference("tokens")
    found, warnings = generate(settings)
    compare(found, warnings, wait(), result)


def generate(settings: "Settings") -> tuple[dict[str, dict[str, list[list[int]]]], list[str]]:
    """The device's texts by `graphs` or `eager`, then by way and batch; and warnings about graphs."""
    model, texts = tiny.model(), prompts(settings.quick)
    found: dict[str, dict[str, list[list[int]]]] = {}
    with warnings_about_graphs() as warnings:
        for graphs in (True, False):
            tiny.prepare(model, graphs, len(texts), max(map(len, texts)) + TOKENS)
            mine = found["graphs" if graphs else "eager"] = {}
            for name, early_exit in WAYS.items():
                # No policy would draft with a model as small as this one.
                with drafting_eagerly():
                    mine[f"{name}, batch {len(texts)}"] = continued(model, texts, early_exit)
                    mine[f"{name}, batch 1"] = [continued(model, [text], early_exit)[0] for text in texts[:3]]
            model.release_decoding()
    return found, warnings


def continued(model: Any, texts: list[list[int]], early_exit: dict | bool) -> list[list[int]]:
    """Up to `TOKENS` new tokens after each prompt, EOS the last."""
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    lengths = {"max_length": TOKENS, "min_length": 0}
    sampling = {"use_greedy": True, "add_BOS": False, "end_strings": ["<|endoftext|>"]}
    inputs = ids, torch.tensor([len(text) for text in texts])
    output = model.generate(inputs, lengths, sampling, early_exit=early_exit)
    return [row[len(text) :] for row, text in zip(output["token_ids"], texts, strict=True)]


def compare(
    found: dict[str, dict[str, list[list[int]]]],
    warnings: list[str],
    expected: dict[str, list[dict]],
    result: Result,
) -> None:
    """Adds a row per way, and a fault for each that differs."""
    for how, ways in found.items():
        for name, texts in ways.items():
            rows = expected[name.partition(",")[0]][: len(texts)]
            equal, total, fault = 0, 0, ""
            for index, (mine, row) in enumerate(zip(texts, rows, strict=True)):
                sure = decided(row["margins"])
                total += len(row["tokens"])
                wrong = next((k for k in range(sure) if mine[k : k + 1] != row["tokens"][k : k + 1]), None)
                if wrong is None and sure == len(row["tokens"]) < len(mine):
                    fault = fault or f"prompt {index}: goes on where the CPU's text ends"
                equal += sure if wrong is None else wrong
                if wrong is not None and not fault:
                    token = mine[wrong] if wrong < len(mine) else "the end"
                    fault = (
                        f"prompt {index}, token {wrong}: {token} instead of the CPU's {row['tokens'][wrong]}, "
                        f"which it prefers by {row['margins'][wrong]:.2g}"
                    )
            if not fault and equal < COMPARED * total:
                fault = f"only {equal} of {total} tokens could be compared, the others after near decisions"
            result.expect(not fault, f"{name}, {how}", f"{equal} of {total} tokens as on the CPU", fault)
    if warnings:
        result.faults.append(f"CUDA graphs: {warnings[0]}")


def decided(margins: list[float]) -> int:
    """How many tokens come before the first near decision."""
    return next((k for k, margin in enumerate(margins) if margin < MARGIN), len(margins))


@contextlib.contextmanager
def warnings_about_graphs() -> Iterator[list[str]]:
    """Collects what decoding warns of inside, also what was already warned of in this process."""
    from nemo.utils import logging as nemo_logging

    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if NO_GRAPHS in record.getMessage():
                messages.append(record.getMessage())

    collector = Collector()
    nemo_logging.once_logged.clear()
    nemo_logging._logger.addHandler(collector)
    try:
        yield messages
    finally:
        nemo_logging._logger.removeHandler(collector)
