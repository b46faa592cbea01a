# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Lossless decoding against full depth alone, many times on the same prompts, side by side.

    python scripts/benchmarks/lossless_pairs.py --model base.nemo --adapter exits.nemo --data text_validation

decoding.py compares many ways, a few times each; this answers one question of it more exactly: does lossless
decoding lose, where does it win, and was that to be expected (lossless_forecast.py)? In a pair both decode the same
prompts in one process and take turns after every token or round, so that whatever else slows the machine down slows
both. A case (batch size, prompt length, threshold) takes pairs, each of other prompts, for `--seconds` or as far as
the text goes, and at least `--pairs`. Results go to OUTPUT/lossless_pairs.json case by case; started again, the script
does those that are missing, then writes OUTPUT/lossless_pairs.md and .png.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from decoding import load, numbers, restore, save

from nemo_ee.files.output import write_text, write_with
from nemo_ee.report.markdown import table
from nemo_ee.report.statistics import spread
from nemo_ee.report.style import FINAL_LINE_COLOUR, new_figure
from nemo_ee.runtime.script import user_errors

MOST_PAIRS = 60
"""Of a case; as many as there are prompts, where these are fewer."""
LIMIT = 0.95
"""Lossless decoding's tokens per second over full depth's, at least."""
PAYS = 1.05
"""Forecast from which a gain is expected: less is within what finding out costs."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="the base, or a model merged with its exits, a .nemo")
    parser.add_argument("--adapter", help="the exits alone, a .nemo")
    parser.add_argument("--data", required=True, help="prefix of an indexed dataset, for prompts")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="directory")
    parser.add_argument("--batches", type=numbers(int), default=[1, 4, 16])
    parser.add_argument("--prompts", type=numbers(int), default=[32, 512], help="tokens")
    parser.add_argument("--thresholds", type=numbers(float), default=[0.5, 0.7, 0.9])
    parser.add_argument("--pairs", type=int, default=8, help="of each case, at least")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each case, at least")
    parser.add_argument("--new-tokens", type=int, default=32, help="per prompt, at least 2")
    parser.add_argument("--precision", choices=("32", "bf16"), default="32")
    arguments = parser.parse_args()
    if arguments.new_tokens < 2 or min(*arguments.batches, *arguments.prompts, arguments.pairs) < 1:
        parser.error("--new-tokens must be 2 or more; batches, prompts and pairs 1 or more")
    return arguments


def settings(arguments: argparse.Namespace) -> dict:
    """What cases must have in common to stand on one page."""
    files = {key: Path(getattr(arguments, key) or "").name for key in ("model", "adapter", "data")}
    kept = ("pairs", "seconds", "new_tokens", "precision")
    return {**{key: getattr(arguments, key) for key in kept}, **files}


def run_pair(
    model: Any, ways: dict[str, dict | bool], prompts: list[list[int]], count: int
) -> tuple[dict[str, float], dict[str, list]]:
    """Continues prompts in every way at once, a token or round of one after one of the other.

    Args:
        model: a `MegatronGPTEarlyExitModel`.
        ways: name -> early-exit options of `model.generate`.
        prompts: token ids.
        count: new tokens per prompt.

    Returns:
        Of each way the seconds that its steps behind the first tokens took, and its sequences.
    """
    from decoding_passes import synchronise
    from decoding_ways import SAMPLING, lengths

    from nemo_ee.inference.generate import generating
    from nemo_ee.inference.request import parse_request
    from nemo_ee.inference.sequence import Sequence as Continued
    from nemo_ee.inference.session import DecodingSession
    from nemo_ee.inference.stopping import StopRule

    stop, longest = StopRule(model.text_tokenizer, SAMPLING["end_strings"]), len(prompts[0]) + count
    seconds, sequences, sessions = dict.fromkeys(ways, 0.0), {}, {}
    with generating(model):
        decoding = model.decoding_model()
        for name, options in ways.items():
            request = parse_request(lengths(count), SAMPLING, options, model.early_exit)
            exits = sorted(request.exits) if request.lossless else []
            sessions[name] = DecodingSession(decoding, exits, len(prompts), longest)
            sequences[name] = [Continued(prompt, request, stop, stop.eos, count) for prompt in prompts]
            sessions[name].add(sequences[name])
        while any(session.running for session in sessions.values()):
            for name, session in sessions.items():
                if session.running:
                    synchronise()
                    begin = time.perf_counter()
                    known = count_tokens(sequences[name])
                    while session.running and count_tokens(sequences[name]) == known:
                        session.step()  # drafts, until they are verified
                    synchronise()
                    seconds[name] += time.perf_counter() - begin
    return seconds, sequences


def count_tokens(sequences: Sequence[Any]) -> int:
    """That these have been continued by."""
    return sum(len(each.tokens) for each in sequences)


def measure(model: Any, case: dict, arguments: argparse.Namespace) -> dict:
    """Times the pairs of one case; returns it with what was found.

    Raises:
        GenerationError: the text has not enough prompts.
    """
    from decoding_cell import read_prompts
    from lossless_forecast import RoundTimer, forecast, frequencies

    from nemo_ee.errors import GenerationError
    from nemo_ee.evaluation import provenance

    batch, pairs = case["batch"], arguments.pairs
    prompts, _ = read_prompts(arguments.data, batch * MOST_PAIRS, case["prompt"], model.true_vocab_size)
    if len(prompts) < batch * pairs:
        raise GenerationError(
            f"--data {arguments.data}: {len(prompts)} prompts of {case['prompt']} tokens are too few for "
            f"--pairs {pairs} of {batch}; give fewer pairs, or more text"
        )
    exits = {"threshold": case["threshold"], "exits": list(model.early_exit.layers), "lossless": True}
    seconds: dict[str, list[float]] = {"full": [], "lossless": []}
    drafts = accepted = equal = done = 0
    timer, full_texts = RoundTimer(model, batch, case["prompt"] + arguments.new_tokens // 2), []
    run_pair(model, {"full": False, "lossless": exits}, prompts[:batch], 4)
    begin = time.monotonic()
    while done < pairs or time.monotonic() - begin < arguments.seconds:
        texts = prompts[done * batch : (done + 1) * batch]
        if len(texts) < batch:
            break
        ways = {"full": False, "lossless": exits} if done % 2 else {"lossless": exits, "full": False}
        times, found = run_pair(model, ways, texts, arguments.new_tokens)
        for name in seconds:
            seconds[name].append(times[name])
        timer.round()
        full_texts += [(each.prompt, each.tokens) for each in found["full"]]
        drafts += sum(each.statistics.drafts for each in found["lossless"])
        accepted += sum(each.statistics.accepted for each in found["lossless"])
        equal += [each.tokens for each in found["full"]] == [each.tokens for each in found["lossless"]]
        done += 1
    layers = model.early_exit.layers
    often = frequencies(model, full_texts, case["threshold"])
    return {
        **case,
        "settings": settings(arguments),
        "decoding_seconds": seconds,
        "drafts": drafts,
        "accepted": accepted,
        "equal": equal,
        "forecast": forecast(timer.costs(), often, layers, batch)._asdict(),
        "command": provenance.command(),
        "commit": provenance.commit(),
        "device": provenance.device(),
        "load": provenance.load_average(),
        "date": provenance.date(),
    }


def ratios(case: dict) -> list[float]:
    """Speed of lossless decoding over full depth's, pair by pair."""
    times = case["decoding_seconds"]
    return [full / lossless for full, lossless in zip(times["full"], times["lossless"], strict=True)]


def middle(case: dict) -> float:
    """Median of `ratios`."""
    return statistics.median(ratios(case))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """That holds the median of all such pairs with 95 % confidence: two of the values, by their ranks (each is above
    the median with a chance of one half); all of them where there are fewer than six."""
    from scipy.stats import binom

    ordered = sorted(values)
    outside = max(0, int(binom.ppf(0.025, len(ordered), 0.5)) - 1)
    return ordered[outside], ordered[-1 - outside]


def page(cases: Sequence[dict]) -> str:
    """The report as Markdown."""
    first, commits = cases[0], ", ".join(dict.fromkeys(case["commit"] for case in cases))
    lines = [_line(case) for case in cases]
    worst = min(cases, key=middle)
    held = "holds in all cases" if middle(worst) >= LIMIT else "does **not** hold in all cases"
    promising = [case for case in cases if case["forecast"]["speed"] >= PAYS]
    faster = sum(middle(case) > 1 for case in promising)
    header = [
        "case",
        "pairs",
        "lossless x full depth",
        "interval of the median",
        "forecast",
        "drafts",
        "accepted",
        "equal texts",
    ]
    return f"""# Lossless decoding against full depth, in pairs

`{first["command"]}`

Commit {commits}. {first["device"]}; {cases[-1]["date"]}. Precision {first["settings"]["precision"]}, greedy,
{first["settings"]["new_tokens"]} new tokens per prompt; tokens per second from the first token on. Both decode the same
prompts in one process and take turns after every token or round. Medians (quartiles) of pairs, and where the median of
all such pairs lies with 95 % confidence. *Equal texts* counts pairs with the same tokens (others differ where two
tokens are as probable within rounding). *Forecast*: the round that should pay most, and its speed, from how often its
exit is sure, and right then, on full depth's texts and from the time of its passes, both measured apart from lossless
decoding.

The limit, a median of {LIMIT:.2f} or more, {held}; the worst is {_name(worst)}. Where a round should make {PAYS:g} x or
more, lossless decoding is faster than full depth in {faster} of {len(promising)} cases.

{table(header, lines)}

![Lossless decoding over full depth](lossless_pairs.png)
"""


def _name(case: dict) -> str:
    return f"batch {case['batch']}, prompt {case['prompt']}, threshold {case['threshold']:g}"


def _line(case: dict) -> list[str]:
    found, (low, high) = spread(ratios(case)), interval(ratios(case))
    pairs = len(ratios(case))
    share = f"{case['accepted'] / case['drafts']:.0%}" if case["drafts"] else ""
    return [
        _name(case),
        str(pairs),
        f"{found.median:.3f} ({found.q25:.3f} to {found.q75:.3f})",
        f"{low:.3f} to {high:.3f}",
        _forecast(case["forecast"]),
        str(case["drafts"]),
        share,
        f"{case['equal']} of {pairs}",
    ]


def _forecast(found: dict) -> str:
    if not found["length"]:
        return "1.000: no round pays"
    drafts = f"{found['length']} draft{'s' * (found['length'] > 1)} of exit {found['layer']}"
    return f"{found['speed']:.3f}: {drafts}, sure {found['sure']:.0%}, right {found['right']:.0%}"


def plot(cases: Sequence[dict]) -> Any:
    """A figure: every pair, and where each case's median lies."""
    figure, (axes,) = new_figure(1, width=9.0, height=1.2 + 0.4 * len(cases))
    for index, case in enumerate(cases):
        values = ratios(case)
        (low, high), median = interval(values), middle(case)
        axes.plot(values, [index] * len(values), "o", color="#cc79a7", alpha=0.3, markersize=5)
        axes.errorbar(
            median, index, xerr=[[median - low], [high - median]], fmt="D", color="#882255", capsize=4
        )
    speeds = [case["forecast"]["speed"] for case in cases]
    axes.plot(speeds, range(len(cases)), "k|", markersize=18, markeredgewidth=2, label="forecast")
    axes.axvline(1.0, color=FINAL_LINE_COLOUR, label="full depth")
    axes.axvline(LIMIT, color=FINAL_LINE_COLOUR, linestyle="--", label="limit of the median")
    axes.set_yticks(range(len(cases)), [_name(case) for case in cases])
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s of lossless decoding over full depth's, pairs and medians", fontsize=11)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False, fontsize=10)
    return figure


def cases_of(arguments: argparse.Namespace) -> list[dict]:
    """All that are asked for: batch size, prompt length, threshold."""
    return [
        {"batch": batch, "prompt": prompt, "threshold": threshold}
        for prompt in arguments.prompts
        for batch in arguments.batches
        for threshold in arguments.thresholds
    ]


def main() -> None:
    arguments = parse_arguments()
    path = arguments.output / "lossless_pairs.json"
    done = load(path, settings(arguments))
    model = None
    with user_errors():
        for case in cases_of(arguments):
            if any(case.items() <= each.items() for each in done):
                continue
            if model is None:
                model = restore(arguments)
                model.prepare_decoding()
            print(f"{_name(case)}: …", flush=True)
            done.append(measure(model, case, arguments))
            save(path, done)
    done.sort(key=lambda case: (case["prompt"], case["batch"], case["threshold"]))
    write_with(path.with_suffix(".png"), partial(plot(done).savefig, format="png"))
    write_text(path.with_suffix(".md"), page(done))
    print(page(done))


if __name__ == "__main__":
    main()
