# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Text documents to Megatron's indexed dataset (``.bin`` and ``.idx``), tokenized by several processes.

The input is read twice. The first pass checks every record, drops empty and repeated documents, counts the
rest and so settles the split. The second tokenizes. Both stream, and results come back in input order, so
the output does not depend on the number of processes.
"""

import math
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from nemo_ee.data.preprocess_config import PreprocessConfig
from nemo_ee.data.split import assign_splits
from nemo_ee.data.staged_datasets import StagedDatasets
from nemo_ee.data.survey import Survey, kept_documents, survey_documents
from nemo_ee.data.tokenizer import DocumentTokenizer, TokenizerConfig, load_tokenizer, tokenizer_files
from nemo_ee.errors import ConfigError, DataError, Fault

DOCUMENTS_PER_TASK = 64
TASKS_IN_FLIGHT = 64
"""Bounds the documents in memory to 4096, however large the corpus."""
CHARACTERS_PER_WORKER = 8_000_000
"""No process is started for less: importing the tokenizer library takes as long as tokenizing this much."""


def preprocess(config: PreprocessConfig) -> dict:
    """Writes the indexed dataset(s) that ``config`` asks for, and ``<output_prefix>.json`` with the counts.

    Nothing is written under a final name before everything is written: first ``.bin``, then ``.idx``, at
    last the ``.json``, whose presence therefore means that the rest is complete.

    Args:
        config: checked settings.

    Returns:
        The content of the ``.json``: documents and tokens in all and per split, tokenizer, vocabulary size,
        ids before each document, end-of-document id, dtype, split, seed, and each input's size and sha256.

    Raises:
        ConfigError: the tokenizer cannot be loaded, or has no end-of-sequence token while ``append_eod`` is
            set.
        DataError: input missing, malformed or without text; the output exists and ``overwrite`` is false.
    """
    prefixes = _output_prefixes(config)
    if not config.overwrite:
        _refuse_existing(config.output_prefix, prefixes)
    survey = survey_documents(config.input, config.document, config.json_key, config.deduplicate)
    documents = survey.documents
    labels = [""] * documents if config.split is None else assign_splits(documents, config.split, config.seed)
    with tokenizer_files(config.tokenizer) as tokenizer_config:
        tokenizer = load_tokenizer(tokenizer_config)
        eod = _end_of_document(config, tokenizer)
        encoded = _encode_all(
            kept_documents(survey, config.document, config.json_key),
            tokenizer,
            tokenizer_config,
            _worker_count(config, survey),
        )
        with StagedDatasets(prefixes, tokenizer.vocab_size) as datasets:
            progress = tqdm(encoded, total=documents, unit="doc", desc="tokenizing", mininterval=0.5)
            for name, token_ids in zip(labels, progress, strict=True):
                if token_ids:
                    datasets.add(name, token_ids + eod)
                else:
                    survey.empty += 1
            _refuse_empty(datasets)
            summary = _summary(config, tokenizer, survey, datasets)
            datasets.publish(Path(f"{config.output_prefix}.json"), summary)
    return summary


def _end_of_document(config: PreprocessConfig, tokenizer: DocumentTokenizer) -> list[int]:
    if not config.append_eod:
        return []
    if tokenizer.eod is None:
        rule = f"the tokenizer {config.tokenizer.name} has no end-of-sequence token"
        raise ConfigError(Fault("append_eod", True, rule, "set append_eod=false or add an eos_token to it"))
    return [tokenizer.eod]


def _refuse_empty(datasets: StagedDatasets) -> None:
    for name, count in datasets.counts().items():
        if count["tokens"] == 0:
            raise DataError(
                f"split.{name}: must get tokens, the tokenizer made none of its documents; give more text"
            )


def _output_prefixes(config: PreprocessConfig) -> dict[str, Path]:
    if config.split is None:
        return {"": Path(config.output_prefix)}
    return {name: Path(f"{config.output_prefix}_{name}") for name in config.split}


def _refuse_existing(output_prefix: str, prefixes: dict[str, Path]) -> None:
    files = [f"{prefix}{suffix}" for prefix in prefixes.values() for suffix in (".bin", ".idx")]
    existing = [name for name in [*files, f"{output_prefix}.json"] if os.path.exists(name)]
    if existing:
        raise DataError(
            f"output_prefix={output_prefix}: must not exist yet, {existing[0]} does; "
            "set overwrite=true or choose another prefix"
        )


def _worker_count(config: PreprocessConfig, survey: Survey) -> int:
    wanted = config.workers or os.cpu_count() or 1
    return max(1, min(wanted, math.ceil(survey.characters / CHARACTERS_PER_WORKER)))


def _encode_all(
    texts: Iterator[str], tokenizer: DocumentTokenizer, config: TokenizerConfig, workers: int
) -> Iterator[list[int]]:
    """Token ids of each text, in order."""
    if workers == 1:
        yield from map(tokenizer.encode, texts)
        return
    # "spawn": forking a process in which torch or a tokenizer has threads can deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(config,)) as pool:
        while block := list(islice(texts, DOCUMENTS_PER_TASK * TASKS_IN_FLIGHT)):
            yield from pool.map(_encode_in_worker, block, chunksize=DOCUMENTS_PER_TASK)


_worker_tokenizer: DocumentTokenizer | None = None


def _start_worker(config: TokenizerConfig) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = load_tokenizer(config)


def _encode_in_worker(text: str) -> list[int]:
    assert _worker_tokenizer is not None
    return _worker_tokenizer.encode(text)


def _summary(
    config: PreprocessConfig, tokenizer: DocumentTokenizer, survey: Survey, datasets: StagedDatasets
) -> dict:
    counts = datasets.counts()
    return {
        "documents": sum(count["documents"] for count in counts.values()),
        "tokens": sum(count["tokens"] for count in counts.values()),
        "splits": counts if config.split is not None else None,
        "empty_documents": survey.empty,
        "repeated_documents": survey.repeated,
        "tokenizer": config.tokenizer.name,
        "tokenizer_library": config.tokenizer.library if config.tokenizer.nemo is None else "nemo",
        "vocabulary_size": tokenizer.vocab_size,
        "dtype": datasets.dtype.name,
        "bos": tokenizer.before,
        "eod": tokenizer.eod if config.append_eod else None,
        "document": config.document,
        "json_key": config.json_key,
        "split": dict(config.split) if config.split is not None else None,
        "seed": config.seed,
        "inputs": [
            {"path": str(path), "bytes": path.stat().st_size, "sha256": survey.digests[str(path)]}
            for path in survey.files
        ],
    }
