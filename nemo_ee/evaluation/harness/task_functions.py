# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What task files name: how an answer is scored. A task's folder works wherever nemo_ee can be imported."""

from collections.abc import Mapping, Sequence
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """F-measures of a summary against the example's own, with stemming; 0 to 1."""
    scores = RougeScorer(list(ROUGE), use_stemmer=True).score(doc["summary"], results[0])
    return {name: scores[name].fmeasure for name in ROUGE}


def no_score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Of code that nobody runs: how many characters there are."""
    return {"characters": float(len(results[0]))}
