# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Training a byte-level BPE tokenizer on a corpus, as a Hugging Face tokenizer directory."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import compress, islice
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from nemo_ee.data.split import assign_splits
from nemo_ee.errors import DataError, Fault
from nemo_ee.files.output import claim, replaced_folder
from nemo_ee.preprocessing.preprocess_config import CorpusSettings
from nemo_ee.preprocessing.survey import Rules, kept_documents, survey_documents
from nemo_ee.schema import holds

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


VOCABULARY = holds(
    lambda size: size > BYTES + 1,
    f"{BYTES} bytes and the end of text leave nothing to learn",
    "use more, e.g. 8192",
)


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainingConfig(CorpusSettings):
    """Text files in, a tokenizer directory out. With `split` the tokenizer learns from its `train` alone.

    Attributes:
        output: the directory to write.
        vocabulary_size: tokens, at most: 256 bytes, the end of text, and what is learned.
        end_of_text: the token that ends documents; also BOS and padding.
    """

    output: Annotated[str, holds(bool, "must be a path", "set output=DIRECTORY")]
    vocabulary_size: Annotated[int, VOCABULARY] = 8192
    end_of_text: Annotated[str, holds(str.strip, "must be text", "e.g. <|endoftext|>")] = "<|endoftext|>"

    def faults(self) -> list[Fault]:
        """See `Settings`."""
        if self.split is None or self.split.get(TRAINING):
            return []
        rule = f"has no share for {TRAINING}, which the tokenizer learns from"
        return [Fault("split", dict(self.split), rule, "give it one, or set split=null")]


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
        rules = Rules(config.document, config.json_key, config.longest_document)
        self.survey = survey_documents(config.inputs, rules, config.deduplicate)
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
        model_input_names=["input_ids", "attention_mask"],
    )
    with replaced_folder(config.output) as part:
        wrapped.save_pretrained(part)
