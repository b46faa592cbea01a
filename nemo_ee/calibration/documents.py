# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Documents of an indexed dataset: the independent units of a calibration."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from nemo_ee.data.checks import check_indexed_dataset
from nemo_ee.errors import DataError, Fault


@dataclass(frozen=True)
class Documents:
    """Beginnings of documents.

    Attributes:
        tokens: per document its token ids, int64; at least two, since the first is not predicted.
        available: documents of the dataset that have as many.
    """

    tokens: tuple[np.ndarray, ...]
    available: int

    @property
    def sizes(self) -> np.ndarray:
        """[D] predicted tokens per document."""
        return np.array([len(ids) - 1 for ids in self.tokens])

    def batches(self, batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Numbers of documents, and their token ids [B, S + 1], padded by zeros behind each document.

        Documents of about the same length go together, so that little is padded.
        """
        order = np.argsort(self.sizes, kind="stable")
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size].tolist()
            rows = [torch.from_numpy(self.tokens[number]) for number in chosen]
            yield chosen, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def read_documents(prefix: str, count: int, length: int, vocab_size: int, seed: int) -> Documents:
    """A random choice of documents, in random order, each cut to its beginning.

    Args:
        prefix: of an indexed dataset, without `.bin` and `.idx`. Its document boundaries count: a document
            may consist of several of its sequences.
        count: documents at most; fewer if the dataset has not as many.
        length: predicted tokens per document at most.
        vocab_size: of the model.
        seed: of the choice.

    Raises:
        DataError: the dataset is missing or damaged, has no document of two tokens, or is of another
            vocabulary.
    """
    keys = dict(key="data.prefix", length_key="data.seq_length")
    file = check_indexed_dataset(prefix, 1, vocab_size, "held-out text", **keys)
    ends = np.concatenate([[0], np.cumsum(file.sequence_lengths, dtype=np.int64)])
    dataset = IndexedDataset(
        prefix
    )  # needs a name: its arrays are views of files that it closes when deleted
    bounds = ends[dataset.document_indices]
    starts, stops = bounds[:-1], bounds[1:]
    usable = np.flatnonzero(stops - starts >= 2)
    if not len(usable):
        rule = "no document has two tokens, so none is predicted"
        raise DataError(str(Fault("data.prefix", prefix, rule, "give longer documents")))
    chosen = np.random.default_rng(seed).permutation(usable)[:count]
    ids = file.token_ids()
    pieces = (ids[starts[n] : min(stops[n], starts[n] + length + 1)] for n in chosen)
    return Documents(tuple(piece.astype(np.int64) for piece in pieces), len(usable))
