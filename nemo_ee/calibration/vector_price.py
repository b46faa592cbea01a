# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What a token costs on average with given thresholds, one text at a time: what it leaves out, less what exits cost.

A token runs the layers up to the first exit that is asked, then that exit's head, and so on. A token that goes on
behind an exit takes along those of its text that have waited there since the one before that went on; so a pass of w
tokens stands for w - 1 that left and one that did not. What waits at a text's end is never computed.
"""

from collections.abc import Sequence

import numpy as np

from nemo_ee.calibration.exit_decisions import TokenScores
from nemo_ee.decoding.leaving import is_asked
from nemo_ee.decoding.pass_prices import PassPrices


def seconds_per_token(
    scores: TokenScores, exits: np.ndarray, thresholds: Sequence[float], prices: PassPrices
) -> float:
    """The mean over all tokens of what passes, heads and the output layer take.

    Args:
        scores: of the tokens, those of a document in the order of its text.
        exits: [T] where each leaves, as `first_exits` says.
        thresholds: one per exit.
        prices: of passes.
    """
    starts = np.flatnonzero(np.diff(scores.documents, prepend=-1))
    before = np.repeat(starts - 1, np.diff(starts, append=len(exits)))
    going, low, seconds = np.arange(len(exits)), 0, 0.0
    for n in np.flatnonzero(is_asked(np.asarray(thresholds))):
        layer = scores.layers[n]
        seconds += _passes(going, before, low, layer, prices) + len(going) * prices.head(layer, 1)
        going, low = going[exits[going] > n], layer
    seconds += _passes(going, before, low, scores.num_layers, prices) + len(going) * prices.output(1)
    return seconds / len(exits)


def pass_seconds(prices: PassPrices, low: int, high: int, tokens: int) -> float:
    """Of a pass of tokens from layer `low` to `high`; nothing if there is no layer between, as behind an exit on the
    last one."""
    return prices.segment(low, high, tokens) if low < high else 0.0


def _passes(going: np.ndarray, before: np.ndarray, low: int, high: int, prices: PassPrices) -> float:
    """Seconds of the passes between two layers, one per token that goes there; `before` is the place in front of each
    token's document."""
    last = np.maximum(np.concatenate([[-1], going[:-1]]), before[going])
    counts = np.bincount(going - last)
    return sum(counts[w] * pass_seconds(prices, low, high, w) for w in np.flatnonzero(counts).tolist())
