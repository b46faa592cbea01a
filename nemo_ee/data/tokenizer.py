# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Tokenizers as NeMo configurations describe them, without a model.

A Hugging Face tokenizer is loaded by transformers directly: importing NeMo's language collection for it
would take ten more seconds in every worker process. All other libraries go through NeMo's own factory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ee.errors import ConfigError, Fault, first_line
from nemo_ee.runtime.upstream.legacy_sentencepiece import name_special_pieces


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
        sentencepiece_legacy: NeMo's old way of special tokens with sentencepiece; None is its default, true.
        special_tokens: tokens by their roles (``eos_token``, ...), which NeMo adds.
        additional_special_tokens: further ones.
        add_bos: put BOS before each document, or not; None for the tokenizer's own rule, as with ``nemo`` for what
            that checkpoint says. Nothing comes before a document that begins with it.
        nemo: a ``.nemo`` checkpoint to take the tokenizer from, instead of all of the above but ``add_bos``.
    """

    library: str = "huggingface"
    type: str | None = None
    model: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    delimiter: str | None = None
    use_fast: bool = True
    trust_remote_code: bool = False
    sentencepiece_legacy: bool | None = None
    special_tokens: Mapping | Sequence | None = None
    additional_special_tokens: Mapping | Sequence | None = None
    add_bos: bool | None = None
    nemo: str | None = None

    @property
    def name(self) -> str:
        """What identifies the tokenizer to a reader: the checkpoint, directory or model file."""
        return str(self.nemo or self.type or self.model or self.library)


def load(config: TokenizerConfig) -> Any:
    """Loads the tokenizer that `config` describes. For one inside a ``.nemo`` see `checkpoint.tokenizer`.

    Args:
        config: with ``nemo`` unset.

    Returns:
        A transformers tokenizer where `is_plain`, else NeMo's, as `MegatronBaseModel` builds it.

    Raises:
        ConfigError: naming ``tokenizer.type`` or ``tokenizer.library``: it cannot be loaded.
    """
    assert config.nemo is None, "take the tokenizer out of the checkpoint first: tokenizer_files"
    try:
        return _from_pretrained(config) if is_plain(config) else _from_nemo(config)
    except Exception as error:  # every library fails in its own way
        if config.library == "huggingface":
            rule = f"must be a Hugging Face tokenizer that loads ({first_line(error)})"
            remedy = "give a directory that holds tokenizer.json and tokenizer_config.json"
            raise ConfigError(Fault("tokenizer.type", config.type, rule, remedy)) from error
        rule = f"NeMo cannot load it ({error})"
        raise ConfigError(Fault("tokenizer.library", config.library, rule, "check tokenizer.*")) from error


def is_plain(config: TokenizerConfig) -> bool:
    """Whether it is a Hugging Face tokenizer to which NeMo would add nothing."""
    added = config.special_tokens is not None or config.additional_special_tokens is not None
    return config.library == "huggingface" and not added


def _from_pretrained(config: TokenizerConfig) -> Any:
    """As NeMo's: where there is no fast tokenizer the slow one, and the other way round."""
    from transformers import AutoTokenizer

    files: dict[str, Any] = {"vocab_file": config.vocab_file, "merges_file": config.merge_file}
    given = {key: value for key, value in files.items() if value is not None}
    given["local_files_only"] = Path(config.type or "").is_dir()  # nothing of it is anywhere else
    failures = []
    for use_fast in (config.use_fast, not config.use_fast):
        try:
            loaded = AutoTokenizer.from_pretrained(
                config.type, use_fast=use_fast, trust_remote_code=config.trust_remote_code, **given
            )
            if loaded is False:  # which slow tokenizers give instead of an error
                raise ValueError("its files are those of another kind of tokenizer")
            return loaded
        except Exception as error:  # of whatever the folder's own class raises
            failures.append(error)
    raise failures[0]


def _from_nemo(config: TokenizerConfig) -> Any:
    from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer

    legacy = config.sentencepiece_legacy
    tokenizer: Any = get_nmt_tokenizer(
        library=config.library,
        model_name=config.type,
        tokenizer_model=config.model,
        vocab_file=config.vocab_file,
        merges_file=config.merge_file,
        delimiter=config.delimiter,
        use_fast=config.use_fast,
        trust_remote_code=config.trust_remote_code,
        special_tokens=config.special_tokens,
        legacy=config.library == "sentencepiece" if legacy is None else legacy,
    )
    if config.additional_special_tokens is not None:
        tokenizer.add_special_tokens(config.additional_special_tokens)
    name_special_pieces(tokenizer)
    return tokenizer
