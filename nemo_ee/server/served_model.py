# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What the server tells of its model, and its tokenizer for several threads."""

import copy
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_ee.config import EarlyExitConfig
from nemo_ee.decoding.request import GenerationRequest
from nemo_ee.errors import GenerationError
from nemo_ee.generation.prompts import chat_tokens
from nemo_ee.generation.stopping import end_tokens
from nemo_ee.generation.text import TextTokenizer
from nemo_ee.server.answers.errors import ApiError


class SharedTokenizer:
    """A model's tokenizer for several threads: each call has it alone, as tokenizers do not promise more.

    Encoding and decoding have a copy each, so that a long prompt does not keep the engine waiting.

    Args:
        tokenizer: the model's.
        add_bos: put BOS before each text, or not; None for the model's rule.

    Raises:
        GenerationError: a BOS that the tokenizer lacks.
    """

    def __init__(self, tokenizer: TextTokenizer, add_bos: bool | None = None):
        tokenizer.before(add_bos)
        self._encoder, self._encoding, self._add_bos = tokenizer, threading.Lock(), add_bos
        self._decoder, self._decoding = copy.deepcopy(tokenizer), threading.Lock()
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        with self._encoding:
            return self._encoder.encode(text, self._add_bos)

    def encode_chat(self, turns: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant answers.

        Raises:
            ApiError: 400 without a chat template, or if it refuses the turns.
        """
        try:
            with self._encoding:
                return chat_tokens(self._encoder.nemo, turns)
        except GenerationError as error:
            raise ApiError(400, str(error), "messages", "invalid_value") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Their text; special tokens have none."""
        with self._decoding:
            return self._decoder.decode(ids)

    def end_tokens(self, strings: Sequence[str], ignore_eos: bool) -> tuple[frozenset[int], list[str]]:
        """See `nemo_ee.generation.stopping.end_tokens`."""
        with self._encoding:
            return end_tokens(self._encoder, strings, ignore_eos)

    def token_bytes(self, token: int) -> bytes:
        """See `TextTokenizer.token_bytes`; each token is asked for once."""
        if token not in self._bytes:
            with self._decoding:
                self._bytes[token] = self._decoder.token_bytes(token)
        return self._bytes[token]


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
        context_length: positions of a sequence: tokens of a prompt, and of its answer but the last.
        base: the file of the model that the exits belong to, without its folder and ending.
        pass_prices: see `PassPrices.shown`; empty where there are no exits.
        created: seconds since 1970.
    """

    name: str
    tokenizer: SharedTokenizer
    early_exit: EarlyExitConfig
    usual: GenerationRequest
    num_layers: int
    vocabulary: int
    context_length: int
    base: str
    pass_prices: dict[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    def require(self, name: str) -> None:
        """Raises ApiError, 404, for another model's name."""
        if name != self.name:
            raise ApiError(404, f"model={name}: this server has {self.name}", "model", "model_not_found")
