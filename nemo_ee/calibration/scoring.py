# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What the exits of a model say about every token of documents, as arrays."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nemo_ee.calibration.documents import Documents
from nemo_ee.calibration.exit_decisions import TokenScores
from nemo_ee.errors import DataError
from nemo_ee.evaluation.scored_model import Score


def score_documents(
    score: Score,
    documents: Documents,
    layers: Sequence[int],
    num_layers: int,
    batch_size: int,
    advance: Callable[[int], Any] = lambda count: None,
) -> TokenScores:
    """Scores every predicted token of every document that counts.

    Args:
        score: of the model.
        documents: D of them.
        layers: exits in use, ascending.
        num_layers: of the model.
        batch_size: documents at a time.
        advance: called after every batch with its number of documents.

    Returns:
        Tokens in the order of documents, and of their positions within each.

    Raises:
        DataError: a confidence that is no number.
    """
    sizes = documents.sizes
    starts = np.concatenate([[0], np.cumsum(sizes)])
    confidences = np.empty((len(layers), starts[-1]))
    disagrees = np.empty((len(layers), starts[-1]), dtype=bool)
    for numbers, ids in documents.batches(batch_size):
        scores = score(ids[:, :-1], ids[:, 1:])
        final = scores.final.tokens.cpu().numpy()
        for index, layer in enumerate(layers):
            sure, tokens = (
                t.cpu().numpy() for t in (scores.exits[layer].confidences, scores.exits[layer].tokens)
            )
            for row, number in enumerate(numbers):
                place = slice(starts[number], starts[number + 1])
                confidences[index, place] = documents.of(number, sure[row])
                disagrees[index, place] = documents.of(number, tokens[row] != final[row])
        advance(len(numbers))
    for layer, row in zip(layers, confidences, strict=True):
        if broken := np.count_nonzero(~np.isfinite(row)):
            rule = f"its confidence is not finite at {broken} of {len(row)} tokens"
            raise DataError(
                f"exit {layer}: {rule}; use a wider precision, or look at the checkpoint's weights"
            )
    return TokenScores(
        tuple(layers), num_layers, confidences, disagrees, np.repeat(np.arange(len(sizes)), sizes)
    )
