# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The tokenizer that turns documents into token ids."""

from typing import Protocol

from nemo_ee.data import tokenizer
from nemo_ee.data.token_rules import beginning, joined, known_id, tokens_before_a_text
from nemo_ee.data.tokenizer import TokenizerConfig
from nemo_ee.errors import ConfigError, Fault


class DocumentTokenizer(Protocol):
    """What preprocessing needs of a tokenizer."""

    vocab_size: int
    """One more than the largest token id."""
    eod: int | None
    """Id of the token that ends a document (the end-of-sequence token), if the vocabulary has one."""

    before: list[int]
    """What a document begins with: BOS, or nothing."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` behind ``before``, without an end-of-sequence token; none for a text without tokens."""


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer; the same ids as NeMo's ``AutoTokenizer.text_to_ids``, behind BOS.

    Args:
        config: of which `tokenizer.is_plain` is true.

    Raises:
        ConfigError: the tokenizer cannot be loaded, or has no BOS and ``add_bos`` is true.
    """

    def __init__(self, config: TokenizerConfig):
        self._tokenizer = tokenizer.load(config)
        self.vocab_size = max(len(self._tokenizer), max(self._tokenizer.get_vocab().values()) + 1)
        eos, sep = self._tokenizer.eos_token_id, self._tokenizer.sep_token_id
        self.eod = eos if eos is not None else sep
        bos, cls = self._tokenizer.bos_token_id, self._tokenizer.cls_token_id
        self.before = _before(tokens_before_a_text(self._tokenizer), cls if bos is None else bos, config)

    def encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return joined(self.before, ids) if ids else []


class NemoTokenizer:
    """Any tokenizer that NeMo builds.

    Args:
        config: the tokenizer's description.

    Raises:
        ConfigError: the tokenizer cannot be loaded, or has no BOS and ``add_bos`` is true.
    """

    def __init__(self, config: TokenizerConfig):
        self._tokenizer = tokenizer.load(config)
        self.vocab_size = int(self._tokenizer.vocab_size)
        self.eod = known_id(getattr(self._tokenizer, "eos_id", None))
        own = tokens_before_a_text(self._tokenizer.tokenizer) if config.library == "huggingface" else []
        self.before = _before(own, known_id(getattr(self._tokenizer, "bos_id", None)), config)

    def encode(self, text: str) -> list[int]:
        ids = list(self._tokenizer.text_to_ids(text))
        return joined(self.before, ids) if ids else []


def _before(own_rule: list[int], bos: int | None, config: TokenizerConfig) -> list[int]:
    try:
        return beginning(own_rule, bos, config.add_bos)
    except LookupError as error:
        rule, remedy = str(error), "set tokenizer.add_bos=false"
        raise ConfigError(Fault("tokenizer.add_bos", config.add_bos, rule, remedy)) from error


def load_tokenizer(config: TokenizerConfig) -> DocumentTokenizer:
    """Loads the tokenizer that `config` describes; see `tokenizer.load`.

    Raises:
        ConfigError: the tokenizer cannot be loaded, or has no BOS and ``add_bos`` is true.
    """
    return HuggingFaceTokenizer(config) if tokenizer.is_plain(config) else NemoTokenizer(config)
