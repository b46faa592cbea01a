# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The tokenizer that turns documents into token ids, described as NeMo configurations describe it.

A Hugging Face tokenizer is loaded by transformers directly: importing NeMo's language collection for it
would take ten more seconds in every worker process. All other libraries go through NeMo's own factory.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from nemo_ee.data.token_rules import beginning, joined, known_id, name_special_pieces, tokens_before_a_text
from nemo_ee.errors import CheckpointError, ConfigError, DataError, Fault, first_line
from nemo_ee.files.scratch import scratch_folder


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


_OF_CHECKPOINT = (
    "library",
    "type",
    "model",
    "vocab_file",
    "merge_file",
    "delimiter",
    "sentencepiece_legacy",
    "special_tokens",
    "additional_special_tokens",
)
"""What is taken from a checkpoint's `tokenizer` section as it is; never `trust_remote_code`."""


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
        config: with ``library: huggingface`` and ``type`` set, and no special tokens.

    Raises:
        ConfigError: the tokenizer cannot be loaded, or has no BOS and ``add_bos`` is true.
    """

    def __init__(self, config: TokenizerConfig):
        try:
            self._tokenizer = _from_pretrained(config)
        except Exception as error:
            raise ConfigError(
                Fault(
                    "tokenizer.type",
                    config.type,
                    f"must be a Hugging Face tokenizer ({first_line(error)})",
                    "give a directory that holds tokenizer.json and tokenizer_config.json",
                )
            ) from error
        self.vocab_size = max(len(self._tokenizer), max(self._tokenizer.get_vocab().values()) + 1)
        eos, sep = self._tokenizer.eos_token_id, self._tokenizer.sep_token_id
        self.eod = eos if eos is not None else sep
        bos, cls = self._tokenizer.bos_token_id, self._tokenizer.cls_token_id
        self.before = _before(tokens_before_a_text(self._tokenizer), cls if bos is None else bos, config)

    def encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return joined(self.before, ids) if ids else []


class NemoTokenizer:
    """Any tokenizer that NeMo's ``get_nmt_tokenizer`` builds, called as ``MegatronBaseModel`` calls it.

    Args:
        config: the tokenizer's description.

    Raises:
        ConfigError: NeMo refuses the description or cannot load the files.
    """

    def __init__(self, config: TokenizerConfig):
        from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer

        legacy = config.sentencepiece_legacy
        if legacy is None:
            legacy = config.library == "sentencepiece"
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
                special_tokens=config.special_tokens,
                legacy=legacy,
            )
            if config.additional_special_tokens is not None:
                self._tokenizer.add_special_tokens(config.additional_special_tokens)
        except Exception as error:  # every library fails in its own way
            raise ConfigError(
                Fault(
                    "tokenizer.library",
                    config.library,
                    f"NeMo cannot build it ({error})",
                    "check tokenizer.*",
                )
            ) from error
        self.vocab_size = int(self._tokenizer.vocab_size)
        name_special_pieces(self._tokenizer)
        self.eod = known_id(getattr(self._tokenizer, "eos_id", None))
        own = tokens_before_a_text(self._tokenizer.tokenizer) if config.library == "huggingface" else []
        self.before = _before(own, known_id(getattr(self._tokenizer, "bos_id", None)), config)

    def encode(self, text: str) -> list[int]:
        ids = list(self._tokenizer.text_to_ids(text))
        return joined(self.before, ids) if ids else []


def _from_pretrained(config: TokenizerConfig) -> Any:
    """As NeMo's: where there is no fast tokenizer the slow one, and the other way round."""
    from transformers import AutoTokenizer

    files = {"vocab_file": config.vocab_file, "merges_file": config.merge_file}
    files = {key: value for key, value in files.items() if value is not None}
    failures = []
    for use_fast in (config.use_fast, not config.use_fast):
        try:
            loaded = AutoTokenizer.from_pretrained(
                config.type, use_fast=use_fast, trust_remote_code=config.trust_remote_code, **files
            )
            if loaded is False:  # which slow tokenizers give instead of an error
                raise ValueError("its files are those of another kind of tokenizer")
            return loaded
        except Exception as error:  # of whatever the folder's own class raises
            failures.append(error)
    raise failures[0]


def _before(own_rule: list[int], bos: int | None, config: TokenizerConfig) -> list[int]:
    try:
        return beginning(own_rule, bos, config.add_bos)
    except LookupError as error:
        rule, remedy = str(error), "set tokenizer.add_bos=false"
        raise ConfigError(Fault("tokenizer.add_bos", config.add_bos, rule, remedy)) from error


def load_tokenizer(config: TokenizerConfig) -> DocumentTokenizer:
    """Loads the tokenizer that ``config`` describes. For one inside a ``.nemo`` see :func:`tokenizer_files`.

    Args:
        config: with ``nemo`` unset.

    Raises:
        ConfigError: the tokenizer cannot be loaded.
    """
    assert config.nemo is None, "take the tokenizer out of the checkpoint first: tokenizer_files"
    added = config.special_tokens is not None or config.additional_special_tokens is not None
    plain = config.library == "huggingface" and not added
    return HuggingFaceTokenizer(config) if plain else NemoTokenizer(config)


@contextmanager
def tokenizer_files(config: TokenizerConfig) -> Iterator[TokenizerConfig]:
    """Puts a tokenizer that travels inside a ``.nemo`` on disk while the context is open.

    Args:
        config: any description. Without ``nemo`` it is handed on as it is.

    Yields:
        A description whose files exist, with ``nemo`` unset: processes of one machine can all load it.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or hostile, or lacks files that its configuration names.
            A ConfigError in the context that names one of its files becomes one, too.
        DataError: its configuration has no tokenizer.
    """
    if config.nemo is None:
        yield config
        return
    from omegaconf import OmegaConf

    from nemo_ee.checkpoint import archive, tokenizer

    model = archive.read_config(config.nemo)
    section = model.get("tokenizer")
    if section is None:
        raise DataError(
            f"tokenizer.nemo={config.nemo}: its configuration has no tokenizer; give tokenizer.type"
        )
    with scratch_folder("tokenizer") as scratch:
        if tokenizer.is_inside(model):
            root = archive.extract(
                config.nemo, scratch / "archive", want=lambda name: not name.startswith("model_weights")
            )
            tokenizer.resolve(model, root, scratch / "home", config.nemo)
        plain: dict[str, Any] = OmegaConf.to_container(section)
        values = {key: plain[key] for key in _OF_CHECKPOINT if plain.get(key) is not None}
        values["use_fast"] = bool(section.get("use_fast", False))  # NeMo's default
        if config.add_bos is None:
            values["add_bos"] = section.get("add_bos")
        try:
            yield replace(config, nemo=None, **values)
        except ConfigError as error:
            if str(scratch) not in str(error):
                raise
            rule = error.faults[0].rule.replace(f"{scratch / 'home'}/", "")
            raise CheckpointError(
                f"tokenizer.nemo={config.nemo}: its tokenizer cannot be loaded: {rule}; copy the checkpoint again"
            ) from error
