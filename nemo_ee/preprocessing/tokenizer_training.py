# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Training a byte-level BPE tokenizer on a corpus, as a Hugging Face tokenizer directory."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import compress, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nemo_ee.data.split import assign_splits
from nemo_ee.data.text_file import LONGEST_LINE
from nemo_ee.errors import ConfigError, DataError, Fault
from nemo_ee.files.output import claim, replaced_folder
from nemo_ee.preprocessing.documents import DOCUMENT_RULES
from nemo_ee.preprocessing.preprocess_config import MISSING, check_split
from nemo_ee.preprocessing.survey import Rules, kept_documents, survey_documents
from nemo_ee.schema import build_config, one_of

BYTES = 256
"""Tokens that every byte-level tokenizer has."""
TRAINING = "train"
MEASURED_DOCUMENTS = 500
"""Training documents that the bytes per token are measured on."""
TOKENIZER_FILES = {
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
}
"""What `overwrite` may replace."""


@dataclass(frozen=True)
class _PlainSettings:
    """The fields of `TokenizerTrainingConfig` that `build_config` can check: all but `split`."""

    input: str | tuple[str, ...]
    output: str
    vocabulary_size: int = 8192
    end_of_text: str = "<|endoftext|>"
    document: str = "file"
    json_key: str = "text"
    longest_document: int = LONGEST_LINE
    deduplicate: bool = True
    seed: int = 1234
    overwrite: bool = False


@dataclass(frozen=True)
class TokenizerTrainingConfig(_PlainSettings):
    """Text files in, a tokenizer directory out.

    Attributes:
        input: files, directories or glob patterns (`.txt`, `.jsonl`, `.json`).
        output: the directory to write.
        vocabulary_size: tokens, at most: 256 bytes, the end of text, and what is learned.
        end_of_text: the token that ends documents; also BOS and padding.
        document: as in `PreprocessConfig`.
        json_key: the key of the text in JSON records that are objects.
        longest_document: as in `PreprocessConfig`.
        deduplicate: keep only the first of documents with identical text.
        seed: of the split.
        overwrite: replace an existing directory.
        split: share of the documents per split; the tokenizer learns from `train` alone. None: from all.
    """

    split: Mapping[str, float] | None = None

    @classmethod
    def from_dict(cls, values: Mapping) -> "TokenizerTrainingConfig":
        """Checks plain values (as from YAML) and builds the configuration.

        Raises:
            ConfigError: listing every unknown key, missing value and value that breaks its rule.
        """
        faults: list[Fault] = []
        given = {key: value for key, value in values.items() if key != "split" and value != MISSING}
        plain = build_config(_PlainSettings, given, "", faults)
        if plain is not None:
            faults += _check(plain)
        shares = values.get("split")
        of_split = [] if shares is None else check_split(shares)
        if shares is not None and not of_split and not shares.get(TRAINING):
            rule = f"has no share for {TRAINING}, which the tokenizer learns from"
            of_split.append(Fault("split", dict(shares), rule, "give it one, or set split=null"))
        if plain is None or faults or of_split:
            raise ConfigError(*faults, *of_split)
        positive = {name: float(share) for name, share in shares.items() if share > 0} if shares else None
        return cls(**vars(plain), split=positive)


@dataclass(frozen=True)
class TrainedTokenizer:
    """What `train_tokenizer` made.

    Attributes:
        vocabulary_size: tokens in all.
        documents: that it learned from.
        bytes_per_token: of UTF-8, over the first of these documents.
    """

    vocabulary_size: int
    documents: int
    bytes_per_token: float


def train_tokenizer(config: TokenizerTrainingConfig) -> TrainedTokenizer:
    """Trains a byte-level BPE tokenizer and writes it as a Hugging Face directory, in one step at the end.

    Args:
        config: checked settings.

    Raises:
        DataError: input missing, malformed or without text; the output exists and `overwrite` is false, or is no
            tokenizer.
        OutputError: another process is writing there, or nothing can be written there.
    """
    with claim(config.output):
        _check_output(config)
        return _train(config)


def _train(config: TokenizerTrainingConfig) -> TrainedTokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    documents = _TrainingDocuments(config)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary_size,
        special_tokens=[config.end_of_text],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    progress = tqdm(documents, total=len(documents), unit="doc", desc="reading", mininterval=0.5)
    tokenizer.train_from_iterator(progress, trainer)
    measured = list(islice(documents, MEASURED_DOCUMENTS))
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(measured))
    _write(tokenizer, config)
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in measured)
    return TrainedTokenizer(tokenizer.get_vocab_size(), len(documents), size / max(1, tokens))


class _TrainingDocuments:
    """The texts of the training split, read anew each time."""

    def __init__(self, config: TokenizerTrainingConfig):
        inputs = (config.input,) if isinstance(config.input, str) else config.input
        rules = Rules(config.document, config.json_key, config.longest_document)
        self.survey = survey_documents(inputs, rules, config.deduplicate)
        labels = [TRAINING] * self.survey.documents
        if config.split is not None:
            labels = assign_splits(self.survey.documents, config.split, config.seed)
        self.chosen = [label == TRAINING for label in labels]

    def __len__(self) -> int:
        return sum(self.chosen)

    def __iter__(self) -> Iterator[str]:
        return compress(kept_documents(self.survey), self.chosen)


def _check_output(config: TokenizerTrainingConfig) -> None:
    output = Path(config.output)
    if not os.path.lexists(output):
        return
    if not (config.overwrite and output.is_dir()):
        remedy = "set overwrite=true or choose another" if output.is_dir() else "choose another"
        raise DataError(f"output={config.output}: must not exist yet; {remedy}")
    if others := sorted(path.name for path in output.iterdir() if path.name not in TOKENIZER_FILES):
        rule = f"holds {others[0]}, which is no tokenizer's and would be lost"
        raise DataError(f"output={config.output}: {rule}; choose another, or remove it")


def _write(tokenizer: Any, config: TokenizerTrainingConfig) -> None:
    from transformers import PreTrainedTokenizerFast

    end = config.end_of_text
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        clean_up_tokenization_spaces=False,
    )
    with replaced_folder(config.output) as part:
        wrapped.save_pretrained(part)


def _check(config: _PlainSettings) -> list[Fault]:
    faults = []
    if not config.input:
        faults.append(
            Fault("input", config.input, "must name a file, directory or pattern", "set input=PATH")
        )
    if not config.output:
        faults.append(Fault("output", config.output, "must be a path", "set output=DIRECTORY"))
    if config.vocabulary_size <= BYTES + 1:
        rule = f"{BYTES} bytes and the end of text leave nothing to learn"
        faults.append(Fault("vocabulary_size", config.vocabulary_size, rule, "use more, e.g. 8192"))
    if not config.end_of_text.strip():
        faults.append(Fault("end_of_text", config.end_of_text, "must be text", "e.g. <|endoftext|>"))
    if config.document not in DOCUMENT_RULES:
        faults.append(one_of("document", config.document, DOCUMENT_RULES))
    if config.longest_document < 1024:
        rule, remedy = "must be bytes, at least 1024", f"the default is {LONGEST_LINE}"
        faults.append(Fault("longest_document", config.longest_document, rule, remedy))
    if config.seed < 0:
        faults.append(Fault("seed", config.seed, "must be at least 0", "choose another"))
    return faults
