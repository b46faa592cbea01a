# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Tokenizing a stream of documents with several processes, with bounded memory, in order."""

import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from typing import TypeVar

from nemo_ee.data.tokenizer import TokenizerConfig
from nemo_ee.errors import DataError
from nemo_ee.preprocessing.document_tokenizer import DocumentTokenizer
from nemo_ee.runtime.children import end_with_parent

T = TypeVar("T")

DOCUMENTS_PER_TASK = 64
CHARACTERS_PER_TASK = 1_000_000
TASKS_IN_FLIGHT = 64
"""Bounds the documents in memory to 4096, and to 64 million characters, however large the corpus."""
CHARACTERS_PER_WORKER = 8_000_000
"""No process is started for less: importing the tokenizer library takes as long as tokenizing this much."""


def encode_all(
    texts: Iterator[str],
    tokenizer: DocumentTokenizer,
    config: TokenizerConfig,
    workers: int | None,
    characters: int,
) -> Iterator[list[int]]:
    """Token ids of each text, in order.

    Args:
        texts: the documents.
        tokenizer: for one process.
        config: of the tokenizer, for several.
        workers: processes at most; None for one per CPU.
        characters: of all documents.

    Raises:
        DataError: a process was killed.
    """
    workers = max(1, min(workers or os.cpu_count() or 1, math.ceil(characters / CHARACTERS_PER_WORKER)))
    if workers == 1:
        yield from map(tokenizer.encode, texts)
        return
    # "spawn": forking a process in which torch or a tokenizer has threads can deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(config,)) as pool:
        try:
            for block in _blocks(texts):
                yield from chain.from_iterable(pool.map(_encode_in_worker, block))
        except BrokenProcessPool as error:
            raise DataError(
                "workers: a process that tokenizes was killed, most likely for want of memory; "
                f"set workers={max(1, workers // 2)}"
            ) from error


def _grouped(items: Iterable[T], most: int, characters: int, size: Callable[[T], int]) -> Iterator[list[T]]:
    """Lists of consecutive items, each ended by so many of them, or of their characters."""
    group: list[T] = []
    total = 0
    for item in items:
        group.append(item)
        total += size(item)
        if len(group) == most or total >= characters:
            yield group
            group, total = [], 0
    if group:
        yield group


def _blocks(texts: Iterable[str]) -> Iterator[list[list[str]]]:
    """What is given to the processes at a time: lists of tasks, which are lists of texts."""
    tasks = _grouped(texts, DOCUMENTS_PER_TASK, CHARACTERS_PER_TASK, len)
    most = TASKS_IN_FLIGHT * CHARACTERS_PER_TASK
    return _grouped(tasks, TASKS_IN_FLIGHT, most, lambda task: sum(map(len, task)))


_worker_tokenizer: DocumentTokenizer | None = None


def _start_worker(config: TokenizerConfig) -> None:
    global _worker_tokenizer
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = DocumentTokenizer(config)


def _encode_in_worker(texts: list[str]) -> list[list[int]]:
    assert _worker_tokenizer is not None
    return [_worker_tokenizer.encode(text) for text in texts]
