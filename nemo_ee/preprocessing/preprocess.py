# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Text documents to Megatron's indexed dataset (``.bin`` and ``.idx``), tokenized by several processes.

The input is read twice. The first pass checks every record, drops empty and repeated documents, counts the
rest and so settles the split. The second tokenizes. Both stream, and results come back in input order, so
the output does not depend on the number of processes.
"""

import os
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from nemo_ee.checkpoint.tokenizer import tokenizer_files
from nemo_ee.data.split import assign_splits
from nemo_ee.data.staged_datasets import StagedDatasets, output_files, staged_datasets
from nemo_ee.errors import ConfigError, DataError, Fault
from nemo_ee.files.output import claim
from nemo_ee.preprocessing.document_tokenizer import DocumentTokenizer
from nemo_ee.preprocessing.encoding import encode_all
from nemo_ee.preprocessing.preprocess_config import PreprocessConfig
from nemo_ee.preprocessing.survey import Rules, Survey, kept_documents, survey_documents


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
        OutputError: another process is writing there, or nothing can be written there.
    """
    prefixes, summary_path = _output_prefixes(config), Path(f"{config.output_prefix}.json")
    with ExitStack() as claims:
        for path in sorted(output_files(prefixes, summary_path)):
            claims.enter_context(claim(path))
        return _preprocess(config, prefixes, summary_path)


def _preprocess(config: PreprocessConfig, prefixes: dict[str, Path], summary_path: Path) -> dict:
    survey = survey_documents(
        config.inputs,
        Rules(config.document, config.json_key, config.longest_document),
        config.deduplicate,
        lambda files: _refuse_existing(config, output_files(prefixes, summary_path), files),
    )
    documents = survey.documents
    labels = [""] * documents if config.split is None else assign_splits(documents, config.split, config.seed)
    with tokenizer_files(config.tokenizer) as tokenizer_config:
        tokenizer = DocumentTokenizer(tokenizer_config)
        eod = _end_of_document(config, tokenizer)
        encoded = encode_all(
            kept_documents(survey), tokenizer, tokenizer_config, config.workers, survey.characters
        )
        with staged_datasets(prefixes, summary_path, tokenizer.vocab_size) as datasets:
            progress = tqdm(encoded, total=documents, unit="doc", desc="tokenizing", mininterval=0.5)
            for name, token_ids in zip(labels, progress, strict=True):
                if token_ids:
                    datasets.add(name, token_ids + eod)
                else:
                    survey.empty += 1
            _refuse_empty(datasets)
            summary = _summary(config, tokenizer, survey, datasets)
            datasets.finish(summary)
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


def _refuse_existing(config: PreprocessConfig, outputs: list[Path], inputs: list[Path]) -> None:
    existing = [path for path in outputs if os.path.lexists(path)]
    for path in existing:
        if any(path.exists() and path.samefile(file) for file in inputs if file.exists()):
            raise DataError(
                f"output_prefix={config.output_prefix}: {path} is an input, and would be lost; "
                "choose another prefix"
            )
    if existing and not config.overwrite:
        raise DataError(
            f"output_prefix={config.output_prefix}: must not exist yet, {existing[0]} does; "
            "set overwrite=true or choose another prefix"
        )


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
            {"path": str(path), "bytes": survey.sizes[str(path)], "sha256": survey.digests[str(path)]}
            for path in survey.files
        ],
    }
