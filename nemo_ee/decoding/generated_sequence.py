# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""One prompt and what is generated after it."""

import random
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from nemo_ee.decoding.logits_processing import TokenSlot
from nemo_ee.decoding.logprobs import TokenLogprobs
from nemo_ee.decoding.request import GenerationRequest


@dataclass
class SequenceStatistics:
    """What a sequence cost.

    Attributes:
        layers_run: passes of one token through one layer, the prompt's included.
        drafts: tokens that exits proposed in lossless decoding.
        accepted: of them, those that the full model agreed with.
    """

    layers_run: int = 0
    drafts: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Draft:
    """A token that an exit proposes, until the full model has verified it.

    Attributes:
        token: its id.
        exit_layer: of the exit.
        confidence: of the exit.
        distribution: [V] that it was drawn from; None for greedy decoding.
    """

    token: int
    exit_layer: int
    confidence: float
    distribution: Tensor | None


class GrowingText(Protocol):
    """A sequence's text, told of its tokens one by one; it may end with them."""

    def feed(self, token: int | None) -> bool:
        """Adds a token, None for one without text; returns whether the text ends behind it."""

    def close(self) -> bool:
        """Says that no token follows; returns whether the text ends with what waited for more."""


@dataclass(eq=False)
class GeneratedSequence:
    """A request in progress; `tokens` and the lists beside it grow with every token that is final.

    Attributes:
        prompt: token ids, at least one.
        request: lengths, sampling, exits.
        end_tokens: each ends the sequence, and has no text.
        eos: tokens that are not chosen before `min_length` tokens.
        limit: tokens to generate, at most; with 0 its prompt is scored.
        seed: of its own random numbers, so that its tokens do not depend on its neighbours.
        text: ends the sequence by what its tokens say; None where only tokens do.
        tokens: generated token ids, the one that ended them included.
        exit_layers: the exit of each generated token; `num_layers` for the final one.
        confidences: of that exit.
        logprobs: what that exit said of each generated token, in lossless decoding the final exit; only on request.
        full_logprobs: [V] each, nats, likewise (`all_probs`).
        prompt_logprobs: what the final exit says of each token of the prompt, None for the first; likewise.
        drafts: of lossless decoding, not yet verified.
        finish_reason: "stop" or "length"; None while it goes on.
        statistics: what it cost so far.
    """

    prompt: list[int]
    request: GenerationRequest
    end_tokens: frozenset[int]
    eos: tuple[int, ...]
    limit: int
    seed: int = 0
    text: GrowingText | None = None
    tokens: list[int] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    full_logprobs: list[Tensor] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    finish_reason: str | None = None
    statistics: SequenceStatistics = field(default_factory=SequenceStatistics)

    def random(self, purpose: str) -> random.Random:
        """Random numbers for a purpose at the place of the next token (or draft).

        A function of the seed, the place and the purpose alone, so that any process can draw a token. A draft's place
        counts from the tokens that it was drawn behind: what a discarded one was drawn with is not used again.
        """
        return random.Random(f"{self.seed}/{len(self.tokens)}/{len(self.drafts)}/{purpose}")

    def twin(self) -> "GeneratedSequence":
        """The same request, not begun, for another process that only chooses tokens; it never ends by itself."""
        return GeneratedSequence(self.prompt, self.request, frozenset(), self.eos, self.limit, self.seed)

    def slot(self, drafts: int | None = None) -> TokenSlot:
        """Behind its tokens and some of its drafts; None means all."""
        options, count = self.request.sampling, len(self.drafts) if drafts is None else drafts
        too_short = len(self.tokens) + count < self.request.min_length
        text: list[int] = []
        if options.repetition_penalty != 1.0:
            text = self.prompt + self.tokens + [draft.token for draft in self.drafts[:count]]
        return TokenSlot(self.eos if too_short else (), options.repetition_penalty, text, options.use_greedy)

    @property
    def positions(self) -> int:
        """That it takes in the caches, at most: the last token is not fed."""
        return len(self.prompt) + max(self.limit - 1, 0)

    @property
    def last_token(self) -> int:
        """The one to feed next."""
        return self.drafts[-1].token if self.drafts else self.tokens[-1]

    def commit(self, token: int, exit_layer: int, confidence: float) -> bool:
        """Adds a final token; returns whether the sequence goes on behind it."""
        self.tokens.append(token)
        self.exit_layers.append(exit_layer)
        self.confidences.append(confidence)
        ends = token in self.end_tokens
        found = self.text is not None and self.text.feed(None if ends else token)
        if ends or found:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "length"
        if self.finish_reason is not None and self.text is not None and self.text.close():
            self.finish_reason = "stop"
        return self.finish_reason is None

    def ends_with_drafts(self) -> bool:
        """Whether the drafts, if they are right, end the sequence; what their text says is asked when they are."""
        count = len(self.tokens) + len(self.drafts)
        return count >= self.limit or self.drafts[-1].token in self.end_tokens
