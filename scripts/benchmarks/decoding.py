# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Decoding speed on the same weights: ours at full depth, with early exits and lossless; NeMo's; Hugging Face's.

    python scripts/benchmarks/decoding.py --model base.nemo --adapter exits.nemo --hf smollm2/ --data text_validation

All ways run in one process and take turns, with a fixed number of new tokens. A case is a batch size and a prompt
length; the memory bandwidth is measured beside it. NeMo's loop and 8-bit weights run at batch 1 only, lossless decoding
of batches and large batches of long prompts with one threshold only. The same command runs on a GPU.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from harness import REQUIRED, alternate, main
from report import Column, columns, plot, ratio, table

from nemo_ee.errors import GenerationError

OPTIONS = {
    "model": (REQUIRED, "the base, or a model merged with its exits, a .nemo"),
    "adapter": (None, "the exits alone, a .nemo"),
    "hf": (REQUIRED, "directory of the same base in Hugging Face's format"),
    "data": (REQUIRED, "prefix of an indexed dataset, for prompts"),
    "batches": ([1, 4, 16], ""),
    "prompts": ([32, 512], "tokens"),
    "thresholds": ([0.5, 0.7, 0.9], "of exits"),
    "samplings": (["greedy"], "greedy, top-p 0.9"),
    "repeats": (7, ""),
    "new_tokens": (32, "per prompt, at least 2"),
    "precision": ("32", "of weights and computation", "32", "bf16"),
}
AXES = ("batches", "prompts")
READ = {"full depth": 1.0, "Hugging Face": 1.0, "NeMo": 1.0, "full depth, bf16": 0.5, "int8": 0.25}
"""What a step reads of all weights' bytes, once, for ways whose every step reads all weights."""
LARGE, JUDGED_TOKENS = 1024, 2048
"""Prompt tokens of a batch above which a case has one threshold only; and that the full model reads to judge a way."""


def cases(arguments: Namespace) -> list[dict]:
    """Batch sizes and prompt lengths."""
    if arguments.new_tokens < 2:
        raise SystemExit("error: --new-tokens must be 2 or more")
    return [{"batch": batch, "prompt": prompt} for prompt in arguments.prompts for batch in arguments.batches]


@cache
def restored(
    model: str, adapter: str | None, hf: str | None, precision: str, rows: int, longest: int
) -> tuple:
    """Ours, twice with weights, caches and CUDA graphs of its own, and Hugging Face's; for all cases."""
    from decoding_ways import Prepared, load_hugging_face, restore

    ours = restore(model, adapter, precision, longest)
    other = hf and load_hugging_face(hf, ours.gpt.output_weight().dtype)
    return Prepared(ours, rows, longest), Prepared(ours, rows, longest), other


def models(arguments: Namespace, hf: str | None = None) -> tuple:
    """See `restored`."""
    size = arguments.batches[-1], arguments.prompts[-1] + arguments.new_tokens
    return restored(arguments.model, arguments.adapter, hf, arguments.precision, *size)


def read_prompts(prefix: str, count: int, tokens: int, vocabulary: int) -> tuple[list[list[int]], str]:
    """Beginnings of documents, or pieces of the whole text where not enough of them are that long; and which."""
    from nemo_ee.data.index_file import open_indexed_file
    from nemo_ee.evaluation.held_out import held_out_sequences
    from nemo_ee.evaluation.settings import HeldOutConfig
    from nemo_ee.evaluation.sweep import document_prompts

    if (open_indexed_file(prefix).sequence_lengths > tokens).sum() >= count:
        return document_prompts(HeldOutConfig(prefix), count, tokens), "beginnings of documents"
    pieces = held_out_sequences(prefix, count, tokens, vocabulary)[:, :tokens].tolist()
    return pieces, "pieces of text, over the ends of documents"


def ways_of(case: Mapping, prepared: Any, other: Any, arguments: Namespace) -> dict[str, tuple]:
    """The ways of a case: name -> kind, threshold, and what generates. Full depth, greedy, comes first."""
    import decoding_ways as ours

    ways: dict[str, tuple] = {}
    every = arguments.thresholds
    for sampling in sorted(arguments.samplings):
        end = "" if sampling == "greedy" else f", {sampling}"
        for kind, (_, options) in ours.KINDS.items():
            few = case["batch"] * case["prompt"] > LARGE or (kind != ours.EXITS and case["batch"] > 1)
            thresholds = every[len(every) // 2 :][:1] if few or end else every
            for threshold in [None] if options is None else thresholds:
                if kind != "int8" or case["batch"] == 1:
                    name = kind if threshold is None else f"{kind}, {threshold:g}"
                    ways[name + end] = kind, threshold, ours.our_way(prepared, kind, threshold, sampling)
        way = ours.HuggingFace(other, ours.SAMPLINGS[sampling])
        ways[ours.HUGGING_FACE + end] = ours.HUGGING_FACE, None, way
    if case["batch"] == 1:
        ways[ours.NEMO] = ours.NEMO, None, ours.NeMo(prepared.model)
    return ways


def measure(case: Mapping, arguments: Namespace) -> dict:
    """Measures one case; raises GenerationError if the models are not the same."""
    from decoding_roofline import Bandwidth, cache_bytes, weight_bytes
    from decoding_ways import EXITS, FULL, HUGGING_FACE, NEMO, Clock

    from nemo_ee.evaluation.settings import SweepConfig
    from nemo_ee.evaluation.sweep import GeneratedText, Sweep

    batch, length, count = case["batch"], case["prompt"], arguments.new_tokens
    prepared, _, other = models(arguments, arguments.hf)
    model, gpt, wanted = prepared.model, prepared.model.gpt, batch * arguments.repeats
    prompts, kind_of_prompts = read_prompts(arguments.data, wanted, length, model.true_vocab_size)
    bandwidth = Bandwidth(weight_bytes(gpt), gpt.output_weight().device)
    ways = ways_of(case, prepared, other, arguments)
    generated: dict[str, list] = {}
    judged: dict[str, list] = {name: [] for name in ways if "top-p" not in name}

    def texts(repeat: int) -> list[list[int]]:
        return [prompts[(repeat * batch + row) % len(prompts)] for row in range(batch)]

    def timed(name: str, way: Any, repeat: int) -> dict[str, float]:
        if repeat >= 0:  # so that no way pays for what the one before it left in the caches
            way([prompt[:8] for prompt in texts(repeat)], 2, Clock())
        clock = Clock()
        generated[name] = way(texts(max(repeat, 0)), count, clock)
        seconds = clock.seconds()
        if not clock.first_tokens or any(len(text) != count for text in generated[name]):
            raise GenerationError(f"{name}: not every text has {count} new tokens, asked for one by one")
        found = {"tokens/s": batch * (count - clock.first_tokens) / (seconds - clock.first)}
        return {**found, "whole call": batch * count / seconds, "first token, ms": 1000 * clock.first}

    def keep(repeat: int, names: Sequence[str]) -> None:
        bandwidth.read()
        few = max(1, JUDGED_TOKENS // length)
        for name in judged.keys() & set(names) if batch * repeat * length < JUDGED_TOKENS else ():
            pairs = zip(texts(repeat)[:few], generated[name][:few], strict=True)
            judged[name] += [GeneratedText(prompt, text, [], []) for prompt, text in pairs]

    runs = {name: lambda r, n=name, way=way: timed(n, way, r) for name, (_, _, way) in ways.items()}
    found, left_out = alternate(runs, arguments.repeats, keep)
    read, sweep = bandwidth.medians(), Sweep(model, [], SweepConfig(), seed=0)
    scores, whole = sweep.score(judged[FULL]), [text.tokens for text in judged[FULL]]
    for name, each in found.items():
        kind, threshold, _ = ways[name]
        if name in judged:
            same = [shared_start(text.tokens, full) for text, full in zip(judged[name], whole, strict=False)]
            each["perplexity"], each["left"] = sweep.perplexity(judged[name]), sum(n < count for n in same)
            each["agreement"] = sum(same) / sum(min(n + 1, count) for n in same)
            each["judged"] = count * len(same)
            if kind == EXITS:
                each["agreement"] = sweep.agreement([threshold] * len(sweep.exits), scores)[0]
            if kind in (NEMO, HUGGING_FACE) and 2 * same.count(0) > len(same):
                raise GenerationError(
                    f"{name}: most texts begin otherwise: give --model and --hf of one model"
                )
        if kind in READ:
            moved = READ[kind] * weight_bytes(gpt) + batch * cache_bytes(gpt, length + count // 2)
            roofline = batch * max(read.values()) / moved
            each["of the roofline"] = [rate and rate / roofline for rate in each["tokens/s"]]
    about = {"exits": list(model.early_exit.layers), "prompts": kind_of_prompts, "left out": left_out}
    return {"ways": found, "bandwidth": {"": {k: v / 1e9 for k, v in read.items()}}, "about case": about}


def shared_start(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    return next((n for n, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))


def page(rows: Sequence[dict]) -> tuple[dict, Any]:
    """What the template needs, and the plot."""
    rows = sorted(rows, key=lambda row: (row["case"]["prompt"], row["case"]["batch"]))
    full, rate = "full depth", "tokens/s"
    shown = columns({rate: 1, "whole call": 1, "first token, ms": 0})
    shown += [Column("x Hugging Face", rate, 2, "Hugging Face"), Column("x full depth", rate, 2, full)]
    shown += columns({"of the roofline": 2, "agreement": 3, "perplexity": 2, "left": 0})
    parts = []
    for row in rows:
        about = row["about case"]
        left = "".join(f" Left out: {name}: {why}." for name, why in about["left out"].items())
        parts.append(f"### Batch {row['case']['batch']}, prompt {row['case']['prompt']}")
        parts.append(table([row], shown, case=None))
        many, judged = len(row["ways"][full][rate]), row["ways"][full]["judged"]
        parts.append(
            f"Prompts: {about['prompts']}. At most {many} repetitions. Quality on {judged} tokens.{left}"
        )
    values = {"exits": rows[0]["about case"]["exits"], "tables": "\n\n".join(parts)}
    values["bandwidth"] = table(
        rows, columns(dict.fromkeys(rows[0]["bandwidth"][""], 1)), "bandwidth", way=None
    )
    points = [(way, row["case"], ratio(row["ways"], way, full, rate)) for row in rows for way in row["ways"]]
    shown = [
        (way, f"batch {c['batch']}, prompt {c['prompt']}", r) for way, c, r in points if way != full and r
    ]
    return values, plot(shown, "tokens/s over full depth's", 1.0)


if __name__ == "__main__":
    main("decoding")
