# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""On a GPU: whether vLLM or SGLang loads an exported base and draft, and makes the base's own greedy texts with it.

    python scripts/engines/draft_in_engine.py vllm BASE DRAFT
    python scripts/engines/draft_in_engine.py sglang BASE DRAFT --dtype bfloat16 --tokens 64

It runs in the engine's environment, which needs nothing of nemo_ee. BASE and DRAFT are folders of scripts/export_hf.py.
Each way runs in a process of its own. Prints, per prompt, whether both texts are equal, the tokens per second of both
ways, and ends with status 1 where texts differ; kernels for one token and for several round differently, so that near
ties may fall out differently: the position of the first difference is printed, to be looked at.

It has not been run. The options are those of vLLM 0.33.0 and SGLang 0.5.23, as their packages on PyPI have them.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Once upon a time, in a village at the foot of the mountains, there lived",
    "Photosynthesis is the process by which",
    "To be, or not to be, that is the question:",
)
DRAFTED = 3
"""Tokens of a draft."""

Greedy = Callable[[int], list[list[int]]]
"""From a number of tokens to the ids of so many behind each prompt."""


def vllm_engine(base: str, draft: str | None, dtype: str) -> Greedy:
    """By vLLM, in which the draft runs in the base's dtype."""
    from vllm import LLM, SamplingParams

    speculative = {"method": "draft_model", "model": draft, "num_speculative_tokens": DRAFTED}
    llm = LLM(model=base, dtype=dtype, speculative_config=speculative if draft else None, max_model_len=2048)

    def greedy(tokens: int) -> list[list[int]]:
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        return [list(output.outputs[0].token_ids) for output in llm.generate(list(PROMPTS), sampling)]

    return greedy


def sglang_engine(base: str, draft: str | None, dtype: str) -> Greedy:
    """By SGLang."""
    import sglang

    options = dict(
        speculative_algorithm="STANDALONE",
        speculative_draft_model_path=draft,
        speculative_num_steps=DRAFTED,
        speculative_eagle_topk=1,
        speculative_num_draft_tokens=DRAFTED + 1,
    )
    engine = sglang.Engine(model_path=base, dtype=dtype, **(options if draft else {}))

    def greedy(tokens: int) -> list[list[int]]:
        sampling = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
        return [list(output["output_ids"]) for output in engine.generate(list(PROMPTS), sampling)]

    return greedy


ENGINES = {"vllm": vllm_engine, "sglang": sglang_engine}


def one_way(arguments: argparse.Namespace) -> None:
    """What a process of its own does: prints its texts and seconds as the last line."""
    greedy = ENGINES[arguments.engine](arguments.base, arguments.draft, arguments.dtype)
    greedy(1)
    began = time.perf_counter()
    texts = greedy(arguments.tokens)
    print(json.dumps({"texts": texts, "seconds": time.perf_counter() - began}), flush=True)


def main() -> None:
    """Runs both ways and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("base")
    parser.add_argument("draft", nargs="?")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--one-way", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one_way:
        one_way(arguments)
        return
    if arguments.draft is None:
        parser.error("DRAFT is missing; export one with scripts/export_hf.py kind=draft")
    found = []
    for draft in ([], [arguments.draft]):
        command = [sys.executable, __file__, arguments.engine, arguments.base, *draft, "--one-way"]
        command += ["--dtype", arguments.dtype, "--tokens", str(arguments.tokens)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(
                f"error: {' '.join(command)} ended with status {done.returncode}; its messages are above"
            )
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"texts"')]
        found.append(json.loads(lines[-1]))
    equal = True
    for prompt, plain, drafted in zip(PROMPTS, found[0]["texts"], found[1]["texts"], strict=True):
        same = plain == drafted
        equal &= same
        place = next(
            (i for i, pair in enumerate(zip(plain, drafted, strict=False)) if pair[0] != pair[1]), None
        )
        print(f"{prompt!r}: {'equal' if same else f'differs from token {place} on'}")
    for name, way in zip(("base alone", "with the draft"), found, strict=True):
        total = sum(map(len, way["texts"]))
        print(f"{name}: {total} tokens, {total / max(way['seconds'], 1e-9):.1f} tokens/s")
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
