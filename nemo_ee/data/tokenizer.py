# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The tokenizer that turns documents into token ids, described as NeMo configurations describe it.

A Hugging Face tokenizer is loaded by transformers directly: importing NeMo's language collection for it
would take ten more seconds in every worker process. All other libraries go through NeMo's own factory.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from nemo_ee.errors import ConfigError, DataError, Fault


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer to use; the keys of NeMo's ``model.tokenizer`` section, plus ``nemo``.

    Attributes:
        library: ``huggingface``, ``sentencepiece``, ``megatron``, or any other that NeMo knows.
        type: for ``huggingface`` the directory (or hub name) of the tokenizer, for ``megatron`` its name.
        model: the model file of a sentencepiece tokenizer.
        vocab_file: vocabulary file, where the library needs one.
        merge_file: BPE merges file, where the library needs one.
        delimiter: separator of a ``tabular`` tokenizer.
        use_fast: use the Rust implementation of a Hugging Face tokenizer.
        trust_remote_code: let a Hugging Face tokenizer run code of its own.
        nemo: a ``.nemo`` checkpoint to take the tokenizer from, instead of all of the above.
    """

    library: str = "huggingface"
    type: str | None = None
    model: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    delimiter: str | None = None
    use_fast: bool = True
    trust_remote_code: bool = False
    nemo: str | None = None

    @property
    def name(self) -> str:
        """What identifies the tokenizer to a reader: the checkpoint, directory or model file."""
        return str(self.nemo or self.type or self.model or self.library)


class DocumentTokenizer(Protocol):
    """What preprocessing needs of a tokenizer."""

    vocab_size: int
    """One more than the largest token id."""
    eod: int | None
    """Id of the token that ends a document (the end-of-sequence token), if the vocabulary has one."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` alone, without a beginning- or end-of-sequence token."""


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer; the same ids as NeMo's ``AutoTokenizer.text_to_ids``.

    Args:
        config: with ``library: huggingface`` and ``type`` set.

    Raises:
        ConfigError: the tokenizer cannot be loaded.
    """

    def __init__(self, config: TokenizerConfig):
        from transformers import AutoTokenizer

        files = {"vocab_file": config.vocab_file, "merges_file": config.merge_file}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                config.type,
                use_fast=config.use_fast,
                trust_remote_code=config.trust_remote_code,
                **{key: value for key, value in files.items() if value is not None},
            )
        except (OSError, ValueError, KeyError) as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigError(
                Fault(
                    "tokenizer.type",
                    config.type,
                    f"must be a Hugging Face tokenizer ({first_line})",
                    "give a directory that holds tokenizer.json and tokenizer_config.json",
                )
            ) from error
        self.vocab_size = max(len(self._tokenizer), max(self._tokenizer.get_vocab().values()) + 1)
        eos, sep = self._tokenizer.eos_token_id, self._tokenizer.sep_token_id
        self.eod = eos if eos is not None else sep

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)


class NemoTokenizer:
    """Any tokenizer that NeMo's ``get_nmt_tokenizer`` builds, called as ``MegatronBaseModel`` calls it.

    Args:
        config: the tokenizer's description.

    Raises:
        ConfigError: NeMo refuses the description or cannot load the files.
    """

    def __init__(self, config: TokenizerConfig):
        from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer

        try:
            self._tokenizer: Any = get_nmt_tokenizer(
                library=config.library,
                model_name=config.type,
                tokenizer_model=config.model,
                vocab_file=config.vocab_file,
                merges_file=config.merge_file,
                delimiter=config.delimiter,
                use_fast=config.use_fast,
                trust_remote_code=config.trust_remote_code,
                legacy=config.library == "sentencepiece",
            )
        except (OSError, ValueError, NotImplementedError) as error:
            raise ConfigError(
                Fault(
                    "tokenizer.library",
                    config.library,
                    f"NeMo cannot build it ({error})",
                    "check tokenizer.*",
                )
            ) from error
        self.vocab_size = int(self._tokenizer.vocab_size)
        self.eod = getattr(self._tokenizer, "eos_id", None)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.text_to_ids(text))


def load_tokenizer(config: TokenizerConfig) -> DocumentTokenizer:
    """Loads the tokenizer that ``config`` describes. For one inside a ``.nemo`` see :func:`tokenizer_files`.

    Args:
        config: with ``nemo`` unset.

    Raises:
        ConfigError: the tokenizer cannot be loaded.
    """
    assert config.nemo is None, "take the tokenizer out of the checkpoint first: tokenizer_files"
    return HuggingFaceTokenizer(config) if config.library == "huggingface" else NemoTokenizer(config)


@contextmanager
def tokenizer_files(config: TokenizerConfig) -> Iterator[TokenizerConfig]:
    """Puts a tokenizer that travels inside a ``.nemo`` on disk while the context is open.

    Args:
        config: any description. Without ``nemo`` it is handed on as it is.

    Yields:
        A description whose files exist, with ``nemo`` unset: processes of one machine can all load it.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or hostile.
        DataError: its configuration has no tokenizer, or names files that the archive lacks.
    """
    if config.nemo is None:
        yield config
        return
    from nemo_ee.checkpoint import archive

    section = archive.read_config(config.nemo).get("tokenizer")
    if section is None:
        raise DataError(
            f"tokenizer.nemo={config.nemo}: its configuration has no tokenizer; give tokenizer.type"
        )
    with tempfile.TemporaryDirectory(prefix="nemo_ee_tokenizer_") as scratch:
        root = archive.extract(config.nemo, scratch, want=lambda name: not name.startswith("model_weights"))
        keys = ("library", "type", "model", "vocab_file", "merge_file", "delimiter")
        values: dict[str, Any] = {
            key: _member_path(section[key], root, config.nemo) for key in keys if section.get(key) is not None
        }
        yield replace(config, nemo=None, **values)


def _member_path(value: str, root: Path, archive_name: str) -> str:
    """The path of a ``nemo:NAME`` reference below ``root``; other values are returned unchanged."""
    if not str(value).startswith("nemo:"):
        return str(value)
    path = root / str(value).removeprefix("nemo:")
    if not path.exists() or root.resolve() not in path.resolve().parents:
        raise DataError(
            f"tokenizer.nemo={archive_name}: must hold {path.name}, its configuration names it; "
            "the checkpoint is incomplete, copy it again"
        )
    return str(path)
