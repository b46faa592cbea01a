# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The settings of text preprocessing, read once from ``conf/preprocess_text.yaml`` and its overrides."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields

from nemo_ee.data.split import SPLITS
from nemo_ee.data.text_file import LONGEST_LINE
from nemo_ee.data.tokenizer import TokenizerConfig
from nemo_ee.errors import ConfigError, Fault
from nemo_ee.preprocessing.documents import DOCUMENT_RULES

MISSING = "???"
"""How OmegaConf writes a mandatory value that was not given."""


@dataclass(frozen=True)
class PreprocessConfig:
    """Text files in, Megatron's indexed dataset out.

    Attributes:
        input: files, directories or glob patterns (``.txt``, ``.jsonl``, ``.json``).
        output_prefix: the dataset is written to ``<output_prefix>_<split>.bin`` and ``.idx``, and its counts
            to ``<output_prefix>.json``. Without a split, to ``<output_prefix>.bin`` and ``.idx``.
        tokenizer: as NeMo describes it under ``model.tokenizer``, or ``nemo: FILE.nemo``.
        document: what one document of a ``.txt`` file is: ``file``, ``line`` or ``paragraph``.
        json_key: the key of the text in JSON records that are objects.
        longest_document: bytes that a document may have, and a line of a ``.jsonl`` file; longer ones are refused.
        append_eod: end each document with the tokenizer's end-of-sequence token.
        deduplicate: keep only the first of documents with identical text, so that none is in two splits.
        split: share of the documents per split, or None for one dataset. Splits with share 0 are not written.
        seed: of the split.
        workers: processes that tokenize, at most; None for one per CPU. The output does not depend on it.
        overwrite: replace an existing dataset.
    """

    input: tuple[str, ...]
    output_prefix: str
    tokenizer: TokenizerConfig
    document: str = "file"
    json_key: str = "text"
    longest_document: int = LONGEST_LINE
    append_eod: bool = True
    deduplicate: bool = True
    split: Mapping[str, float] | None = None
    seed: int = 1234
    workers: int | None = None
    overwrite: bool = False

    @classmethod
    def from_dict(cls, values: Mapping) -> "PreprocessConfig":
        """Checks plain values (as from YAML) and builds the configuration.

        Args:
            values: a mapping with this class's fields; ``tokenizer`` is a mapping with the fields of
                :class:`TokenizerConfig`; ``input`` may be one string.

        Raises:
            ConfigError: listing every unknown key, missing value and value that breaks its rule.
        """
        known = [field.name for field in fields(cls)]
        faults = _unknown_keys(values, known, "")
        given = {key: value for key, value in values.items() if key in known and value != MISSING}
        faults += _check_values(given)
        tokenizer = given.get("tokenizer") or {}
        if isinstance(tokenizer, Mapping):
            tokenizer_keys = [field.name for field in fields(TokenizerConfig)]
            faults += _unknown_keys(tokenizer, tokenizer_keys, "tokenizer.")
            tokenizer = {
                key: value for key, value in tokenizer.items() if key in tokenizer_keys and value != MISSING
            }
            faults += _check_tokenizer(tokenizer)
        else:
            faults.append(
                Fault("tokenizer", tokenizer, "must be a section", "set tokenizer.type or tokenizer.nemo")
            )
        if faults:
            raise ConfigError(*faults)
        inputs = given["input"]
        shares = given.get("split")
        return cls(
            **{
                **given,
                "input": (inputs,) if isinstance(inputs, str) else tuple(inputs),
                "split": {name: float(share) for name, share in shares.items() if share > 0}
                if shares
                else None,
                "tokenizer": TokenizerConfig(**tokenizer),
            }
        )


def _unknown_keys(values: Mapping, known: list[str], prefix: str) -> list[Fault]:
    faults = []
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            faults.append(
                Fault(
                    prefix + str(key), values[key], "is not a known key", f"did you mean {prefix}{nearest}?"
                )
            )
    return faults


def _check_values(given: Mapping) -> list[Fault]:
    faults = []

    def require(key: str, holds: bool, rule: str, remedy: str) -> None:
        if not holds:
            faults.append(Fault(key, given.get(key), rule, remedy))

    inputs = given.get("input")
    names = [inputs] if isinstance(inputs, str) else inputs
    is_names = (
        isinstance(names, list | tuple)
        and bool(names)
        and all(isinstance(name, str) and name for name in names)
    )
    require("input", is_names, "must name at least one file, directory or pattern", "set input=PATH")
    prefix = given.get("output_prefix")
    require(
        "output_prefix", isinstance(prefix, str) and bool(prefix), "must be a path", "set output_prefix=PATH"
    )
    if "document" in given:
        rule = f"must be one of {', '.join(DOCUMENT_RULES)}"
        require("document", given["document"] in DOCUMENT_RULES, rule, "choose one of them")
    for key in ("append_eod", "deduplicate", "overwrite"):
        if key in given:
            require(key, isinstance(given[key], bool), "must be true or false", "write true or false")
    if "json_key" in given:
        require("json_key", isinstance(given["json_key"], str), "must be text", "set the key of the text")
    if "longest_document" in given:
        rule, remedy = "must be bytes, at least 1024", f"the default is {LONGEST_LINE}"
        require("longest_document", _is_int(given["longest_document"], 1024), rule, remedy)
    if "seed" in given:
        require("seed", _is_int(given["seed"], 0), "must be an integer of at least 0", "choose another")
    if given.get("workers") is not None:
        require(
            "workers",
            _is_int(given["workers"], 1),
            "must be an integer of at least 1",
            "or null for all CPUs",
        )
    if given.get("split") is not None:
        faults += check_split(given["split"])
    return faults


def check_split(split: object) -> list[Fault]:
    """What is wrong with shares per split."""
    if not isinstance(split, Mapping):
        return [
            Fault(
                "split",
                split,
                "must give a share per split",
                "e.g. split={train: 0.9, validation: 0.1}, or null",
            )
        ]
    faults = _unknown_keys(split, list(SPLITS), "split.")
    for name, share in split.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < float("inf"):
            faults.append(Fault(f"split.{name}", share, "must be a share of at least 0", "e.g. 0.1"))
    if not faults and not sum(split.values()) > 0:
        faults.append(
            Fault("split", dict(split), "must have a share above 0", "or set split=null for one dataset")
        )
    return faults


def _check_tokenizer(tokenizer: Mapping) -> list[Fault]:
    library = tokenizer.get("library", "huggingface")
    for key in ("add_bos", "sentencepiece_legacy"):
        if tokenizer.get(key) is not None and not isinstance(tokenizer[key], bool):
            remedy = f"set tokenizer.{key}=null"
            return [Fault(f"tokenizer.{key}", tokenizer[key], "must be true, false or null", remedy)]
    if tokenizer.get("nemo"):
        return []
    if library == "huggingface" and not tokenizer.get("type"):
        rule = "must name the directory of a Hugging Face tokenizer"
        return [
            Fault(
                "tokenizer.type", tokenizer.get("type"), rule, "set tokenizer.type=DIR or tokenizer.nemo=FILE"
            )
        ]
    if library == "sentencepiece" and not tokenizer.get("model"):
        return [
            Fault("tokenizer.model", None, "must name the sentencepiece model", "set tokenizer.model=FILE")
        ]
    return []


def _is_int(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum
