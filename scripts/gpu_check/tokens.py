# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Greedy tokens of a tiny model in float32, held to the CPU's.

The reference shares nothing with what is checked but the weights: another process, without a GPU, computes
every token anew from the whole text with the model's own forward (`tests.support.uncached`).
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import tiny
import torch
from result import Result

from nemo_ee.runtime.upstream.cuda_graphs import counted_replays
from tests.support.drafting import drafting_eagerly
from tests.support.uncached import generate_uncached

if TYPE_CHECKING:
    from part import Settings

TOKENS, QUICK_TOKENS, END = 24, 12, 0
EXITS = {2: 0.7, 4: 0.5, 6: 0.6}
"""Exit layer -> threshold, at which texts of these weights leave at every exit."""
WAYS: dict[str, dict | bool] = {
    "full depth": False,
    "exits": {"exits": list(EXITS), "threshold": list(EXITS.values()), "always": True},
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
    """16 of 1 to 12 tokens; quick: 2."""
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(1, 13, (2 if quick else 16,), generator=generator).tolist()
    return [torch.randint(3, 201, (length,), generator=generator).tolist() for length in lengths]


def reference(settings: "Settings") -> dict[str, list[dict]]:
    """Texts of each way as the CPU computes them, tokens and margins. Lossless is full depth."""
    gpt, count = tiny.model().gpt, QUICK_TOKENS if settings.quick else TOKENS
    texts = {}
    for name, exits in (("full depth", {}), ("exits", EXITS)):
        rows = [generate_uncached(gpt, prompt, count, exits) for prompt in prompts(settings.quick)]
        texts[name] = [ended(row.tokens, row.margins) for row in rows]
    return {**texts, "lossless": texts["full depth"]}


def ended(tokens: list[int], margins: list[float]) -> dict[str, list]:
    """A text up to its EOS."""
    length = tokens.index(END) + 1 if END in tokens else len(tokens)
    return {"tokens": tokens[:length], "margins": margins[:length]}


@dataclass
class Generated:
    """The device's texts.

    Attributes:
        texts: by `graphs` or `eager`, then by way and batch.
        replays: of CUDA graphs, likewise.
        warnings: of decoding without graphs.
    """

    texts: dict[str, dict[str, list[list[int]]]] = field(default_factory=dict)
    replays: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def check(settings: "Settings", result: Result) -> None:
    """All ways, batched and one by one, with CUDA graphs and without."""
    wait = settings.start_reference("tokens")
    compare(generate(settings), wait(), result)


def generate(settings: "Settings") -> Generated:
    """The device's side."""
    model, texts = tiny.model(), prompts(settings.quick)
    count = QUICK_TOKENS if settings.quick else TOKENS
    found = Generated()
    with warnings_about_graphs() as found.warnings, counted_replays() as replays:
        for how in ("graphs", "eager"):
            tiny.prepare(model, how == "graphs", len(texts), max(map(len, texts)) + count)
            mine = found.texts[how] = {}
            replays.clear()
            for name, early_exit in WAYS.items():
                # No policy would draft with a model as small as this one.
                with drafting_eagerly():
                    mine[f"{name}, batch {len(texts)}"] = continued(model, texts, count, early_exit)
                    alone = [continued(model, [text], count, early_exit)[0] for text in texts[:3]]
                    mine[f"{name}, one by one"] = alone
            found.replays[how] = replays["replays"]
            model.release_decoding()
    return found


def continued(model: Any, texts: list[list[int]], count: int, early_exit: dict | bool) -> list[list[int]]:
    """Up to `count` new tokens after each prompt, EOS the last."""
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    lengths = {"max_length": count, "min_length": 0}
    sampling = {"use_greedy": True, "add_BOS": False, "end_strings": ["<|endoftext|>"]}
    inputs = ids, torch.tensor([len(text) for text in texts])
    output = model.generate(inputs, lengths, sampling, early_exit=early_exit)
    return [row[len(text) :] for row, text in zip(output["token_ids"], texts, strict=True)]


def compare(found: Generated, expected: dict[str, list[dict]], result: Result) -> None:
    """Adds a row per way, and a fault for each that differs; and one for graphs."""
    for how, ways in found.texts.items():
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
    check_graphs(found.replays["graphs"], found.warnings, result)
    if found.replays["eager"]:
        result.faults.append(f"CUDA graphs: {found.replays['eager']} were replayed, though they are off")


def check_graphs(replays: int, warnings: list[str], result: Result) -> None:
    """A row, and a fault where decoding with graphs ran without them."""
    fault = warnings[0] if warnings else "none was replayed"
    result.expect(replays > 0 and not warnings, "CUDA graphs", f"replayed {replays} times", fault)


def decided(margins: list[float]) -> int:
    """How many tokens come before the first near decision."""
    return next((k for k, margin in enumerate(margins) if margin < MARGIN), len(margins))


@contextlib.contextmanager
def warnings_about_graphs() -> Iterator[list[str]]:
    """Collects what decoding warns of inside, also what was already warned of in this process."""
    from nemo_ee.decoding.cuda.segment_graphs import warn_of_eager

    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if NO_GRAPHS in record.getMessage():
                messages.append(record.getMessage())

    collector = Collector()
    warn_of_eager.cache_clear()
    logging.getLogger("nemo_ee").addHandler(collector)
    try:
        yield messages
    finally:
        logging.getLogger("nemo_ee").removeHandler(collector)
