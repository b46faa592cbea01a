# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What the server tells of its model, and its tokenizer for several threads."""

import copy
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_ee.config import EarlyExitConfig
from nemo_ee.errors import GenerationError
from nemo_ee.inference.prompts import chat_tokens
from nemo_ee.inference.request import GenerationRequest
from nemo_ee.inference.stopping import unseen_token_id
from nemo_ee.inference.text import known_id, text_decoder
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
        self._decode, self._decoding = text_decoder(copy.deepcopy(tokenizer)), threading.Lock()

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
        except AssertionError as error:  # of NeMo's own templates, about a role that they do not know
            text = f"chat: the tokenizer's template refuses these turns: {error}"
            raise ApiError(400, text, "messages", "invalid_value") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Their text, as `ids_to_text`; special tokens have none."""
        with self._decoding:
            return self._decode(ids)

    def end_tokens(self, strings: Sequence[str]) -> tuple[frozenset[int], list[str]]:
        """Tokens that end a sequence: EOS, and stop strings that are special tokens, whose text nobody sees; and
        the other stop strings."""
        ids, texts = {self.eos} - {None}, []
        for string in strings:
            token = self._unseen_token(string)
            if token is None:
                texts.append(string)
            else:
                ids.add(token)
        return frozenset(ids), texts

    def _unseen_token(self, string: str) -> int | None:
        with self._encoding:
            return unseen_token_id(self._encoder, string, self._encoder.ids_to_text)

    @property
    def eos(self) -> int | None:
        """EOS token id; None where there is none."""
        return known_id(self._encoder.eos_id)


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
