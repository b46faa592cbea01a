# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""One way of ours against another, many times on the same prompts, side by side: lossless against full depth, say.

    python scripts/benchmarks/lossless_pairs.py --model base.nemo --adapter exits.nemo --data text_validation

decoding.py compares many ways, a few times each; this answers one question of it more exactly. In a pair both decode
the same prompts in one process and take turns after every token or round, so that whatever else slows the machine down
slows both; or after every text (`--turns text`), so that each finds in the processor's caches what it left there, as
when it runs alone. A case takes pairs, each of other prompts, for `--seconds` or as far as text goes, and at least
`--pairs`.

    … --way "early exit" --calibrated calibration/calibration.json    # at the thresholds of calibrations, on other text
"""

import json
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import decoding
from harness import main, seconds
from report import Column, columns, plot, ratio, table

from nemo_ee.errors import GenerationError

OPTIONS = {
    key: decoding.OPTIONS[key] for key in ("model", "adapter", "data", "batches", "prompts", "thresholds")
}
OPTIONS |= {
    "calibrated": ((), "calibration.json of calibrations, whose thresholds take the place of --thresholds"),
    "way": ("lossless", "of decoding_ways.PAIRED"),
    "base": ("full depth", "what it is compared with"),
    "sampling": ("greedy", "of the way", "greedy", "top-p 0.9"),
    "base_sampling": (None, "of the base, where it is another", "greedy", "top-p 0.9"),
    "turns": ("token", "how long a way goes on before the other does", "token", "text"),
    "pairs": (8, "of each case, at least"),
    "seconds": (60.0, "of each case, at least"),
    **{key: decoding.OPTIONS[key] for key in ("new_tokens", "precision")},
}
AXES = ("batches", "prompts", "thresholds", "calibrated")
MOST_PAIRS = 100
"""Of a case; as many as there are prompts, where these are fewer."""


def cases(arguments: Namespace) -> list[dict]:
    """Batch sizes, prompt lengths and thresholds."""
    thresholds = [{"threshold": each} for each in arguments.thresholds]
    if reports := [json.loads(Path(each).read_text()) for each in arguments.calibrated]:
        thresholds = [
            {"target": each["target_agreement"], "threshold": each["thresholds"]} for each in reports
        ]
    return [{**case, **each} for case in decoding.cases(arguments) for each in thresholds]


def run_pair(ways: Mapping[str, Any], prompts: list[list[int]], count: int, turns: str) -> dict[str, float]:
    """Continues prompts by `count` tokens in all ways (name -> `decoding_ways.Ours`), a token or round of one after one
    of the other, or one text after the other; returns the seconds that each way's steps behind the first tokens
    took."""
    if turns == "text" and len(ways) > 1:
        return {n: run_pair({n: way}, prompts, count, turns)[n] for n, way in ways.items()}
    took = dict.fromkeys(ways, 0.0)
    with ExitStack() as stack:
        for way in ways.values():
            stack.enter_context(way.begun(prompts, count))
        while any(each.session.running for each in ways.values()):
            for name, each in ways.items():
                if each.session.running:
                    took[name] += seconds(each.advance)
    return took


def measure(case: Mapping, arguments: Namespace) -> dict:
    """Times the pairs of one case; raises GenerationError if the text has not enough prompts."""
    from decoding_ways import PAIRED, our_way

    from nemo_ee.evaluation.settings import SweepConfig
    from nemo_ee.evaluation.sweep import GeneratedText, Sweep

    batch, pairs, count = case["batch"], arguments.pairs, arguments.new_tokens
    prepared = decoding.models(arguments)[:2]
    vocabulary = prepared[0].model.true_vocab_size
    prompts, _ = decoding.read_prompts(arguments.data, batch * MOST_PAIRS, case["prompt"], vocabulary)
    if len(prompts) < batch * pairs:
        raise GenerationError(
            f"--data {arguments.data}: {len(prompts)} prompts of {case['prompt']} tokens are too few for "
            f"--pairs {pairs} of {batch}; give fewer pairs, or more text"
        )
    ways = {}
    sampled = arguments.base_sampling or arguments.sampling, arguments.sampling
    for kind, weights, sampling in zip((arguments.base, arguments.way), prepared, sampled, strict=True):
        threshold = None if PAIRED[kind][1] is None else case["threshold"]
        ways[kind] = our_way(weights, kind, threshold, sampling)
    found: dict[str, dict] = {kind: {"tokens/s": []} for kind in ways}
    drafts = accepted = equal = done = 0
    texts_of_base: list[GeneratedText] = []
    run_pair(ways, prompts[:batch], 4, arguments.turns)
    begin = time.monotonic()
    while done < pairs or time.monotonic() - begin < arguments.seconds:
        texts = prompts[done * batch : (done + 1) * batch]
        if len(texts) < batch:
            break
        took = run_pair(dict(list(ways.items())[:: 1 if done % 2 else -1]), texts, count, arguments.turns)
        for kind, each in found.items():
            each["tokens/s"].append(batch * (count - 1) / took[kind])
        base, way = (each.sequences for each in ways.values())
        drafts += sum(each.statistics.drafts for each in way)
        accepted += sum(each.statistics.accepted for each in way)
        equal += [each.tokens for each in base] == [each.tokens for each in way]
        texts_of_base += [GeneratedText(t, each.tokens, [], []) for t, each in zip(texts, base, strict=True)]
        done += 1
    found[arguments.way] |= {"pairs": done, "drafts": drafts, "equal": f"{equal} of {done}"}
    found[arguments.way]["accepted"] = accepted / drafts if drafts else None
    if arguments.way.startswith("early exit") and arguments.base.startswith("full depth"):
        sweep, threshold = Sweep(prepared[0].model, [], SweepConfig(), seed=0), case["threshold"]
        each = threshold if isinstance(threshold, list) else [threshold] * len(sweep.exits)
        mean, around = sweep.agreement(each, sweep.score(texts_of_base))
        found[arguments.way] |= {"judged": sum(len(text.tokens) - 1 for text in texts_of_base)}
        found[arguments.way]["agreement"] = mean if around is None else {"value": mean, **asdict(around)}
    return {"ways": found}


def page(rows: Sequence[dict]) -> tuple[dict, Any]:
    """What the template needs, and the plot, if any."""
    rows = sorted(
        rows, key=lambda row: [row["case"].get(k, 0) for k in ("prompt", "batch", "target", "threshold")]
    )
    settings = rows[0]["settings"]
    base, way = settings["base"], settings["way"]
    shown = [*columns({"pairs": 0, "tokens/s": 1}), Column(f"x {base}", "tokens/s", 3, base)]
    shown += columns({"drafts": 0, "accepted": 2, "equal": 0})
    other = settings.get("base_sampling")
    note = f" {base.capitalize()} is {other} here." if other else ""
    judged = [each for each in ("agreement", "judged") if each in rows[0]["ways"][way]]
    shown += columns(dict(zip(judged, (3, 0), strict=False)))
    if judged:
        note += """ *Agreement* is that of exits, asked for all tokens but a text's first, on full depth's texts of the
pairs, teacher-forced, with its 95 % interval over prompts; *judged* are the tokens."""
    if any("forecast" in row["ways"][way] for row in rows):
        shown += columns({"forecast": 3})
        note += """ *Forecast*: the speed of the round that should pay most, from how often its exit was sure, and right
then, and from the time of its passes, both measured apart from lossless decoding."""
    values = {"title": f"{way} against {base}".capitalize(), "note": note}
    values["turns"] = "text" if settings.get("turns") == "text" else "token or round"
    values["new_tokens"] = " or ".join(map(str, sorted({row["settings"]["new_tokens"] for row in rows})))
    values["table"] = table(rows, shown, way=None, only=lambda name: name == way)
    points = []
    for row in rows:
        case = f"batch {row['case']['batch']}, prompt {row['case']['prompt']}"
        points.append(
            (
                case,
                str(row["case"].get("target", row["case"]["threshold"])),
                ratio(row["ways"], way, base, "tokens/s"),
            )
        )
    return values, plot(points, f"tokens/s of {way} over {base}, by threshold", 1.0)


if __name__ == "__main__":
    main("lossless_pairs")
