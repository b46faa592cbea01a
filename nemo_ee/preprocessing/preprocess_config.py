# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The settings of text preprocessing, read once from ``conf/preprocess_text.yaml`` and its overrides."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Self

from nemo_ee.data.split import SPLITS
from nemo_ee.data.text_file import LONGEST_LINE
from nemo_ee.data.tokenizer import TokenizerConfig
from nemo_ee.errors import Fault
from nemo_ee.preprocessing.documents import DOCUMENT_RULES
from nemo_ee.schema import Settings, choice, holds, is_number, nearest


def check_split(key: str, split: Mapping) -> list[Fault]:
    """What is wrong with shares per split."""
    faults = []
    for name, share in split.items():
        if name not in SPLITS:
            known = [f"{key}.{each}" for each in SPLITS]
            remedy = nearest(f"{key}.{name}", known) or f"known keys: {', '.join(known)}"
            faults.append(Fault(f"{key}.{name}", share, "unknown key", remedy))
        elif not is_number(share) or share < 0:
            faults.append(Fault(f"{key}.{name}", share, "must be a share of at least 0", "e.g. 0.1"))
    if not faults and not sum(split.values()) > 0:
        remedy = "or set split=null for one dataset"
        faults.append(Fault(key, dict(split), "must have a share above 0", remedy))
    return faults


def _check_tokenizer(key: str, tokenizer: TokenizerConfig) -> list[Fault]:
    if tokenizer.nemo:
        return []
    if tokenizer.library == "huggingface" and not tokenizer.type:
        rule = "must name the directory of a Hugging Face tokenizer"
        remedy = f"set {key}.type=DIR or {key}.nemo=FILE"
        return [Fault(f"{key}.type", tokenizer.type, rule, remedy)]
    if tokenizer.library == "sentencepiece" and not tokenizer.model:
        remedy = f"set {key}.model=FILE"
        return [Fault(f"{key}.model", None, "must name the sentencepiece model", remedy)]
    return []


WORKERS = holds(lambda count: count >= 1, "must be an integer of at least 1", "or null for all CPUs")
AT_LEAST_0 = holds(lambda seed: seed >= 0, "must be an integer of at least 0", "choose another")
BYTES = holds(lambda size: size >= 1024, "must be bytes, at least 1024", f"the default is {LONGEST_LINE}")
NAMES = holds(
    lambda names: bool(names) and all([names] if isinstance(names, str) else names),
    "must name at least one file, directory or pattern",
    "set input=PATH",
)


@dataclass(frozen=True, kw_only=True)
class CorpusSettings(Settings):
    """Which documents are read, and how they are split.

    Attributes:
        input: files, directories or glob patterns (``.txt``, ``.jsonl``, ``.json``), or one of these.
        document: what one document of a ``.txt`` file is: ``file``, ``line`` or ``paragraph``.
        json_key: the key of the text in JSON records that are objects.
        longest_document: bytes that a document may have, and a line of a ``.jsonl`` file; longer ones are refused.
        deduplicate: keep only the first of documents with identical text, so that none is in two splits.
        split: share of the documents per split, or None for one dataset. Splits with share 0 are not written.
        seed: of the split.
        overwrite: replace an existing output.
    """

    input: Annotated[str | tuple[str, ...], NAMES]
    document: Annotated[str, choice(*DOCUMENT_RULES)] = "file"
    json_key: str = "text"
    longest_document: Annotated[int, BYTES] = LONGEST_LINE
    deduplicate: bool = True
    split: Annotated[Mapping | None, check_split] = None
    seed: Annotated[int, AT_LEAST_0] = 1234
    overwrite: bool = False

    @classmethod
    def from_dict(cls, values: Mapping) -> Self:
        """See `Settings`."""
        config = super().from_dict(values)
        shares = {name: float(share) for name, share in (config.split or {}).items() if share > 0}
        return replace(config, split=shares or None)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Of `input`, however many they are."""
        return (self.input,) if isinstance(self.input, str) else self.input


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(CorpusSettings):
    """Text files in, Megatron's indexed dataset out.

    Attributes:
        output_prefix: the dataset is written to ``<output_prefix>_<split>.bin`` and ``.idx``, and its counts
            to ``<output_prefix>.json``. Without a split, to ``<output_prefix>.bin`` and ``.idx``.
        tokenizer: as NeMo describes it under ``model.tokenizer``, or ``nemo: FILE.nemo``.
        append_eod: end each document with the tokenizer's end-of-sequence token.
        workers: processes that tokenize, at most; None for one per CPU. The output does not depend on it.
    """

    output_prefix: Annotated[str, holds(bool, "must be a path", "set output_prefix=PATH")]
    tokenizer: Annotated[TokenizerConfig, _check_tokenizer]
    append_eod: bool = True
    workers: Annotated[int | None, WORKERS] = None
