# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Documents, the independent units of a calibration: of an indexed dataset, chats, or what the model itself says."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from nemo_ee.data.chats.chat_template import ChatTemplate, TurnTemplate, line_tokens
from nemo_ee.data.chats.json_lines import JsonLines
from nemo_ee.data.checks import check_indexed_dataset
from nemo_ee.errors import DataError, Fault, GenerationError


@dataclass(frozen=True)
class Documents:
    """Beginnings of documents.

    Attributes:
        tokens: per document its token ids, int64; at least two, since the first is not predicted.
        available: documents of the source that have as many.
        counted: per document which of its predicted tokens count, bool, one less than tokens; None: all.
    """

    tokens: tuple[np.ndarray, ...]
    available: int
    counted: tuple[np.ndarray, ...] | None = None

    @property
    def sizes(self) -> np.ndarray:
        """[D] predicted tokens per document that count."""
        if self.counted is not None:
            return np.array([int(each.sum()) for each in self.counted])
        return np.array([len(ids) - 1 for ids in self.tokens])

    def of(self, number: int, row: np.ndarray) -> np.ndarray:
        """What counts of a document's row, which has a value per predicted token, and perhaps padding behind."""
        row = row[: len(self.tokens[number]) - 1]
        return row if self.counted is None else row[self.counted[number]]

    def batches(self, batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Numbers of documents, and their token ids [B, S + 1], padded by zeros behind each document.

        Documents of about the same length go together, so that little is padded.
        """
        order = np.argsort([len(ids) for ids in self.tokens], kind="stable")
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


def read_chats(
    path: str, template: ChatTemplate | TurnTemplate, count: int, length: int, limit: int, seed: int
) -> Documents:
    """A random choice of a file's chats, in random order. What counts is all tokens of answers but the first of each,
    which never leaves early.

    Args:
        path: a JSON object per line, see `messages_of`.
        template: of the model.
        count: chats at most; fewer if the file has not as many.
        length: tokens of a chat that count at most.
        limit: tokens that the model can read.
        seed: of the choice.

    Raises:
        DataError: a line that is no chat, or no chat has an answer that can be read.
    """
    lines = JsonLines(path)
    tokens: list[np.ndarray] = []
    counted: list[np.ndarray] = []
    for index in np.random.default_rng(seed).permutation(len(lines)).tolist():
        try:
            ids, answer = line_tokens(template, lines[index])
        except (ValueError, GenerationError) as error:
            raise DataError(f"data.chats_file: {lines.where(index)} {error}") from error
        answers = np.array(answer[: limit + 1], dtype=bool)
        counts = (answers[1:] & answers[:-1]).cumsum()
        counts = answers[1:] & answers[:-1] & (counts <= length)
        if counts.any():
            end = np.flatnonzero(counts)[-1] + 1
            tokens.append(np.array(ids[: end + 1], dtype=np.int64))
            counted.append(counts[:end])
    if not tokens:
        rule = f"no chat has an answer of two tokens within the {limit} that the model can read"
        raise DataError(str(Fault("data.chats_file", path, rule, "give other chats")))
    return Documents(tuple(tokens[:count]), len(tokens), tuple(counted[:count]))


def continue_documents(
    documents: Documents,
    prompt_tokens: int,
    length: int,
    batch_size: int,
    generate: Callable[[list[list[int]], int], list[list[int]]],
    advance: Callable[[int], Any] = lambda count: None,
) -> Documents:
    """The beginnings of documents, continued by the model at full depth. What counts is all that it says but the first
    token, which never leaves early. One that says no second token is left out.

    Args:
        documents: of which those are used that have more than `prompt_tokens` tokens.
        prompt_tokens: of each that are the prompt.
        length: tokens that count at most.
        batch_size: prompts at a time.
        generate: prompts of one length, and how many tokens at most -> continuations, greedy.
        advance: called after every batch with its number of documents.

    Raises:
        DataError: nothing is left.
    """
    prompts = [ids[:prompt_tokens].tolist() for ids in documents.tokens if len(ids) > prompt_tokens]
    texts: list[tuple[list[int], list[int]]] = []
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        texts += zip(batch, generate(batch, length + 1), strict=True)
        advance(len(batch))
    texts = [(prompt, said) for prompt, said in texts if len(said) > 1]
    if not texts:
        rule = "no document is longer and is continued by two tokens"
        raise DataError(str(Fault("data.prompt_tokens", prompt_tokens, rule, "use fewer, or other text")))
    tokens = tuple(np.array(prompt + said, dtype=np.int64) for prompt, said in texts)
    counted = tuple(np.arange(len(prompt + said) - 1) >= len(prompt) for prompt, said in texts)
    return Documents(tokens, len(texts), counted)
