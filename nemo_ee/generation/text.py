# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""From text to token ids and back, with what a checkpoint says of its texts: how they begin, and what ends them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from transformers import PreTrainedTokenizerFast
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

from nemo_ee.data.token_rules import beginning, joined, known_id, special_ids, tokens_before_a_text
from nemo_ee.errors import ConfigError, Fault, GenerationError

BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
"""How byte-level vocabularies write bytes."""
BYTE = re.compile("<0x([0-9A-F]{2})>")
SPACE = "\u2581"
"""How SentencePiece's vocabularies write a byte that is a token, and a space."""


class TextTokenizer:
    """NeMo's tokenizer with a model's rules for its texts.

    Special tokens have no text: those flagged so in a Hugging Face tokenizer, SentencePiece's control symbols and
    the special tokens of NeMo's legacy mode. Nor has an id that the tokenizer does not know, which a model with
    rows to spare may choose.

    Args:
        tokenizer: NeMo's.
        settings: the model's `tokenizer` section. Read are `eos_token_ids` (tokens that end a text, beside the
            tokenizer's own EOS) and `add_bos` (whether texts begin with BOS; null: the tokenizer's own rule, and none
            for tokenizers of other libraries than Hugging Face's).

    Attributes:
        nemo: the tokenizer.
        special: ids of special tokens.
        vocab_size: one more than the largest id that may be read; a model sets it to its embedding's rows, padding
            apart. (A Hugging Face tokenizer counts its tokens, and may leave ids out.)

    Raises:
        ConfigError: settings that break a rule.
    """

    def __init__(self, tokenizer: Any, settings: Mapping | None = None):
        settings = {} if settings is None else settings
        others, add_bos = settings.get("eos_token_ids"), settings.get("add_bos")
        self._bos = known_id(getattr(tokenizer, "bos_id", None))
        _check(others, add_bos, self._bos)
        self.nemo = tokenizer
        self._byte_level = False
        self._other_ends = tuple(others or ())
        self._own_rule: list[int] = []
        self._add_bos: bool | None = add_bos
        self._known: frozenset[int] | None = None
        if isinstance(tokenizer, AutoTokenizer):
            self._own_rule = tokens_before_a_text(tokenizer.tokenizer)
            self._byte_level = _is_byte_level(tokenizer.tokenizer)
            self.special = special_ids(tokenizer.tokenizer)
            self._known = frozenset(tokenizer.tokenizer.get_vocab().values()) - self.special
        elif isinstance(tokenizer, SentencePieceTokenizer):
            pieces = range(tokenizer.original_vocab_size)
            control = {token for token in pieces if tokenizer.tokenizer.is_control(token)}
            self.special = frozenset(control | set(tokenizer.id_to_special_token))
            self._known = frozenset(pieces) - self.special
        else:
            self.special = frozenset()
        counted = getattr(tokenizer, "vocab_size", 0)
        self.vocab_size: int = max(counted, max(self.special.union(self._known or ()), default=-1) + 1)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All tokens that end a text, the tokenizer's own EOS first; empty where there is none."""
        own = known_id(getattr(self.nemo, "eos_id", None))
        return tuple(dict.fromkeys([*([] if own is None else [own]), *self._other_ends]))

    def check_ends(self, rows: int) -> None:
        """Refuses ids of `eos_token_ids` that neither the model nor the tokenizer has.

        Args:
            rows: of the embedding, padding apart.

        Raises:
            ConfigError: such an id.
        """
        known = self.special.union(self._known or ())
        if beyond := [token for token in self._other_ends if token >= rows and token not in known]:
            rule, remedy = f"id {beyond[0]} must be below the model's {rows} rows", "leave it out of the list"
            raise ConfigError(Fault("model.tokenizer.eos_token_ids", list(self._other_ends), rule, remedy))

    def before(self, add_bos: bool | None = None) -> list[int]:
        """What a text begins with: BOS, or nothing.

        Args:
            add_bos: None for the model's rule.

        Raises:
            GenerationError: a BOS that the tokenizer lacks.
        """
        try:
            return beginning(self._own_rule, self._bos, self._add_bos if add_bos is None else add_bos)
        except LookupError as error:
            raise GenerationError(f"add_BOS=true: {error}; set it to null or false") from error

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Token ids of a text that is to be continued, with exactly one BOS or none.

        Args:
            text: may begin with the name of BOS itself.
            add_bos: see `before`.
        """
        return joined(self.before(add_bos), self.nemo.text_to_ids(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Their text; as `decode(…, skip_special_tokens=True)` of transformers, spaces left as they are, and
        `decode_ids` of SentencePiece."""
        if self._known is None:
            return self.nemo.ids_to_text(list(ids))
        shown = [token for token in ids if token in self._known]
        if isinstance(self.nemo, SentencePieceTokenizer):
            return self.nemo.tokenizer.decode_ids(shown)
        if _decodes_by_core(type(self.nemo.tokenizer)):  # which takes a tenth of the time
            return self.nemo.tokenizer.backend_tokenizer.decode(shown, skip_special_tokens=False)
        return self.nemo.tokenizer.decode(
            shown,
            skip_special_tokens=False,  # they are gone, and slow tokenizers would look for them once more
            clean_up_tokenization_spaces=False,  # which would change text that has been streamed
            spaces_between_special_tokens=False,
        )

    def name(self, token: int) -> str:
        """How the vocabulary writes a token; "" for an id that it lacks."""
        if self._known is not None and token not in self._known and token not in self.special:
            return ""
        return self.nemo.ids_to_tokens([token])[0] or ""

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for in a text, in UTF-8, of which it may be a part of a character; spaces are spaces,
        however the vocabulary writes them. A special token's name; nothing for an id that the tokenizer lacks."""
        name = self.name(token)
        if token in self.special:
            return name.encode()
        if self._byte_level and all(character in BYTES for character in name):
            return bytes(BYTES[character] for character in name)
        if byte := BYTE.fullmatch(name):
            return bytes([int(byte[1], 16)])
        return name.replace(SPACE, " ").encode()

    def special_id(self, name: str) -> int | None:
        """The id of the special token of that name; None for all other strings.

        An ordinary word that is one token is none: it may also come as part of others.
        """
        if not self.special:
            return None
        token = self.nemo.tokens_to_ids([name])[0]
        return token if token in self.special and self.name(token) == name else None


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether the vocabulary of a tokenizer of transformers writes each byte as one character, as GPT-2's."""
    if (core := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return hasattr(tokenizer, "byte_decoder")
    return core.decoder is not None and b'"ByteLevel"' in core.decoder.__getstate__()


def _decodes_by_core(kind: type) -> bool:
    """Whether a tokenizer of transformers leaves decoding to `tokenizers`, and adds nothing of its own."""
    fast = PreTrainedTokenizerFast
    return issubclass(kind, fast) and (kind.decode, kind._decode) == (fast.decode, fast._decode)


def _check(eos_token_ids: Any, add_bos: Any, bos: int | None) -> None:
    faults, prefix = [], "model.tokenizer."
    is_list = isinstance(eos_token_ids, Sequence) and not isinstance(eos_token_ids, str)
    if eos_token_ids is not None and not (is_list and all(type(t) is int and t >= 0 for t in eos_token_ids)):
        rule, remedy = "must be a list of token ids, or null for the tokenizer's own EOS", "set e.g. [2,18]"
        given = list(eos_token_ids) if is_list else eos_token_ids
        faults.append(Fault(f"{prefix}eos_token_ids", given, rule, remedy))
    if add_bos is not None and not isinstance(add_bos, bool):
        rule = "must be true, false, or null for the tokenizer's own rule"
        faults.append(Fault(f"{prefix}add_bos", add_bos, rule, f"set {prefix}add_bos=null"))
    elif add_bos and bos is None:
        rule = "the tokenizer has no BOS token"
        faults.append(Fault(f"{prefix}add_bos", add_bos, rule, f"set {prefix}add_bos=null"))
    if faults:
        raise ConfigError(*faults)
