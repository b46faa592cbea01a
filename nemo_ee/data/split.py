# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The seeded split of documents into training, validation and test, made before anything is fitted."""

from collections.abc import Mapping

import numpy as np

from nemo_ee.errors import DataError

SPLITS = ("train", "validation", "test")


def assign_splits(documents: int, shares: Mapping[str, float], seed: int) -> list[str]:
    """Draws the split of every document: exact counts, random membership.

    Counts are the shares of ``documents`` rounded by largest remainder, but at least one per split.

    Args:
        documents: number of documents.
        shares: split name to a positive share; they are normalised to sum to one.
        seed: of the permutation. The same seed, shares and number of documents give the same split.

    Returns:
        The split's name for each document, in document order.

    Raises:
        DataError: there are fewer documents than splits.
    """
    names = list(shares)
    if documents < len(names):
        raise DataError(
            f"split={dict(shares)}: needs at least one document per split, the input has {documents}; "
            "give more documents (for .txt see the setting document), or a smaller split"
        )
    weights = np.array([shares[name] for name in names], dtype=np.float64)
    exact = weights / weights.sum() * documents
    counts = np.floor(exact).astype(np.int64)
    for index in np.argsort(counts - exact, kind="stable")[: documents - counts.sum()]:
        counts[index] += 1
    while counts.min() < 1:
        counts[counts.argmax()] -= 1
        counts[counts.argmin()] += 1
    order = np.random.default_rng(seed).permutation(documents)
    labels = np.empty(documents, dtype=np.int64)
    labels[order] = np.repeat(np.arange(len(names)), counts)
    return [names[label] for label in labels]
