# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A finite population of documents, scored by two made-up exits, from which calibrations draw with replacement.

As the population is known, so is the agreement of any thresholds on further documents: exactly.
"""

import numpy as np

from nemo_ee.calibration.exit_decisions import TokenScores
from nemo_ee.decoding.pass_prices import PassPrices

LAYERS, NUM_LAYERS, LARGEST = (10, 20), 30, 40
GROWTH = (1.0, 1.02, 1.16, 1.53, 6.0)
"""Of a pass's time with 1, 2, 4, 8 and 40 tokens."""


def made_up_prices(layers=LAYERS, num_layers=NUM_LAYERS, head=1.0, start=0.3, output=4.0) -> PassPrices:
    """Of layers that take a second for a token, plausible beside each other."""
    heads = (tuple(head * each for each in GROWTH),) * len(layers)
    starts, outputs = (start,) * len(GROWTH), tuple(output * each for each in GROWTH)
    return PassPrices(
        num_layers, (1, 2, 4, 8, 40), starts, GROWTH, outputs, outputs, tuple(layers), heads, source="made up"
    )


def population(seed: int, documents: int = 500, bad_share: float = 0.0) -> TokenScores:
    """Documents of 5 to `LARGEST` tokens that differ in difficulty.

    Args:
        seed: of everything.
        documents: how many.
        bad_share: of documents at which every exit is sure of itself and wrong.
    """
    rng = np.random.default_rng(seed)
    sizes = rng.integers(5, LARGEST + 1, documents)
    owner = np.repeat(np.arange(documents), sizes)
    ease = rng.normal(0.0, 0.7, documents)[owner] + rng.normal(0.0, 1.5, len(owner))
    confidences, disagrees = [], []
    for skill in (-0.5, 0.7):
        chance = 1.0 / (1.0 + np.exp(-(ease + skill)))
        confidences.append(np.clip(chance + rng.normal(0.0, 0.1, len(owner)), 0.0, 1.0))
        disagrees.append(rng.random(len(owner)) > chance)
    bad = (rng.random(documents) < bad_share)[owner]
    return TokenScores(
        LAYERS,
        NUM_LAYERS,
        np.where(bad, 0.9 + 0.1 * np.stack(confidences), np.stack(confidences)),
        np.stack(disagrees) | bad,
        owner,
    )


def draw(scores: TokenScores, count: int, rng: np.random.Generator) -> TokenScores:
    """Documents drawn independently, so that one may come twice."""
    ends = np.cumsum(scores.sizes)
    starts = ends - scores.sizes
    chosen = rng.integers(len(ends), size=count)
    places = np.concatenate([np.arange(starts[n], ends[n]) for n in chosen])
    owner = np.repeat(np.arange(count), scores.sizes[chosen])
    return TokenScores(
        scores.layers, scores.num_layers, scores.confidences[:, places], scores.disagrees[:, places], owner
    )
