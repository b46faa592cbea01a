# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The tokenizer that turns documents into token ids."""

from functools import partial

from nemo_ee.data import tokenizer
from nemo_ee.data.token_rules import beginning, joined, known_id, tokens_before_a_text
from nemo_ee.data.tokenizer import TokenizerConfig
from nemo_ee.errors import ConfigError, Fault


class DocumentTokenizer:
    """A tokenizer with a rule for how documents begin; the same ids as NeMo's ``text_to_ids``, behind BOS.

    Args:
        config: of the tokenizer, see `tokenizer.load`.

    Attributes:
        vocab_size: one more than the largest token id.
        eod: id of the token that ends a document (the end-of-sequence token), if the vocabulary has one.
        before: what a document begins with: BOS, or nothing.

    Raises:
        ConfigError: the tokenizer cannot be loaded, or has no BOS and ``add_bos`` is true.
    """

    def __init__(self, config: TokenizerConfig):
        loaded, own = tokenizer.load(config), []
        if tokenizer.is_plain(config):
            self._ids_of = partial(loaded.encode, add_special_tokens=False, verbose=False)
            self.vocab_size = max(len(loaded), max(loaded.get_vocab().values()) + 1)
            eos, bos, own = loaded.eos_token_id, loaded.bos_token_id, tokens_before_a_text(loaded)
            self.eod = loaded.sep_token_id if eos is None else eos
            bos = loaded.cls_token_id if bos is None else bos
        else:
            self._ids_of, self.vocab_size = loaded.text_to_ids, int(loaded.vocab_size)
            self.eod, bos = (known_id(getattr(loaded, name, None)) for name in ("eos_id", "bos_id"))
            if config.library == "huggingface":
                own = tokens_before_a_text(loaded.tokenizer)
        try:
            self.before = beginning(own, bos, config.add_bos)
        except LookupError as error:
            rule, remedy = str(error), "set tokenizer.add_bos=false"
            raise ConfigError(Fault("tokenizer.add_bos", config.add_bos, rule, remedy)) from error

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` behind ``before``, without an end-of-sequence token; none for a text without tokens."""
        ids = list(self._ids_of(text))
        return joined(self.before, ids) if ids else []
