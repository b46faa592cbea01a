# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What the server tells of its model, and its tokenizer for several threads."""

import copy
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

from nemo_ee.config import EarlyExitConfig
from nemo_ee.errors import GenerationError
from nemo_ee.inference.prompts import chat_tokens
from nemo_ee.inference.request import GenerationRequest
from nemo_ee.inference.stopping import special_token_id
from nemo_ee.server.errors import ApiError


class SharedTokenizer:
    """NeMo's tokenizer for several threads: each call has it alone, as tokenizers do not promise more.

    Encoding and decoding have a copy each, so that a long prompt does not keep the engine waiting.

    Args:
        tokenizer: NeMo's.
        add_bos: put BOS before each text.
    """

    def __init__(self, tokenizer: Any, add_bos: bool = False):
        self._encoder, self._encoding, self._add_bos = tokenizer, threading.Lock(), add_bos
        self._decoder, self._decoding = copy.deepcopy(tokenizer), threading.Lock()
        self._special: frozenset[int] | None = None
        if isinstance(
            tokenizer, AutoTokenizer
        ):  # its `ids_to_text` makes the list of special tokens once per token
            self._special = frozenset(tokenizer.tokenizer.all_special_ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        with self._encoding:
            ids = self._encoder.text_to_ids(text)
        return [self._encoder.bos_id, *ids] if self._add_bos else ids

    def encode_chat(self, turns: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant answers.

        Raises:
            ApiError: 400 without a chat template, or if it refuses the turns.
        """
        try:
            with self._encoding:
                return chat_tokens(self._encoder, turns)
        except GenerationError as error:
            raise ApiError(400, str(error), "messages", "invalid_value") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Their text, as `ids_to_text`; special tokens have none."""
        with self._decoding:
            if self._special is None:
                return self._decoder.ids_to_text(list(ids))
            plain = [token for token in ids if token not in self._special]
            return self._decoder.ids_to_text(plain, remove_special_tokens=False)

    def end_tokens(self, strings: Sequence[str]) -> tuple[frozenset[int], list[str]]:
        """Tokens that end a sequence: EOS, and stop strings that are special tokens, whose text nobody sees; and
        the other stop strings."""
        ids, texts = {self.eos}, []
        for string in strings:
            with self._encoding:
                token = special_token_id(self._encoder, string)
                if token is None or self._encoder.ids_to_text([token]):
                    texts.append(string)
                else:
                    ids.add(token)
        return frozenset(ids), texts

    @property
    def eos(self) -> int:
        """EOS token id."""
        return self._encoder.eos_id


@dataclass(frozen=True)
class ServedModel:
    """A model as clients see it.

    Attributes:
        name: what they call it.
        tokenizer: its own.
        early_exit: its exits.
        usual: what a request gets that says nothing of exits.
        num_layers: the final exit's layer.
        vocabulary: number of token ids.
        created: seconds since 1970.
    """

    name: str
    tokenizer: SharedTokenizer
    early_exit: EarlyExitConfig
    usual: GenerationRequest
    num_layers: int
    vocabulary: int
    created: int = field(default_factory=lambda: int(time.time()))

    def require(self, name: str) -> None:
        """Raises ApiError, 404, for another model's name."""
        if name != self.name:
            raise ApiError(404, f"model={name}: this server has {self.name}", "model", "model_not_found")
