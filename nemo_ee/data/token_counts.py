# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""How often each token occurs in the training text; a shortlist head keeps the most frequent ones."""

import math

import numpy as np
import torch

from nemo_ee.data.data_config import dataset_parts
from nemo_ee.data.index_file import IndexedFile, open_indexed_file
from nemo_ee.errors import DataError

ENOUGH_TOKENS = 100_000_000
"""So many rank the tokens that a shortlist keeps, whatever the size of the corpus."""


def token_counts(
    data_prefix: object, vocab_size: int, splits_string: object = None, max_tokens: int | None = None
) -> torch.Tensor:
    """Counts the tokens of the training split.

    In a blend with weights, each dataset's counts are scaled to its weight, so that they rank tokens by how
    often training will see them.

    Args:
        data_prefix: any form of NeMo's ``model.data.data_prefix``.
        vocab_size: number of token ids.
        splits_string: NeMo's ``model.data.splits_string``; needed unless ``data_prefix`` names splits.
        max_tokens: read at most about this many tokens, evenly spread over each dataset.

    Returns:
        Counts per token id, int64 [vocab_size].

    Raises:
        ConfigError: ``data_prefix`` or ``splits_string`` has no valid form.
        DataError: a dataset is missing, damaged or empty, or has token ids beyond the vocabulary.
    """
    parts = dataset_parts(data_prefix, splits_string)["train"]
    files = [open_indexed_file(part.prefix) for part in parts]
    covered = [
        file.sequence_range(*part.sequences(len(file.sequence_lengths)))
        for part, file in zip(parts, files, strict=True)
    ]
    sizes = np.array([part.stop - part.start for part in covered], dtype=np.float64)
    if not sizes.all():
        empty = parts[int(np.argmin(sizes))].prefix
        raise DataError(f"model.data.data_prefix={empty}: must have tokens to train on; give more text")
    weights = sizes if parts[0].weight is None else np.array([part.weight for part in parts])
    shares = weights / weights.sum()
    budgets = sizes if max_tokens is None else np.minimum(sizes, np.ceil(shares * max_tokens))
    counts = np.zeros(vocab_size, dtype=np.float64)
    for file, part, budget, share in zip(files, covered, budgets, shares, strict=True):
        mine = _count(file, part, math.ceil(budget), vocab_size)
        counts += mine * (share * budgets.sum() / mine.sum())
    return torch.from_numpy(np.rint(counts).astype(np.int64))


def _count(file: IndexedFile, part: slice, max_tokens: int, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for block in file.spread_blocks(part, max_tokens):
        if block.min() < 0 or block.max() >= vocab_size:
            raise DataError(
                f"model.data.data_prefix={file.prefix}: must have token ids from 0 to {vocab_size - 1}, has "
                f"{block.min()} to {block.max()}; preprocess the text with the tokenizer of this model"
            )
        counts += np.bincount(block, minlength=vocab_size)
    return counts
