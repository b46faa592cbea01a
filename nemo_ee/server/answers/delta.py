# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What the engine tells of one choice at a time."""

from dataclasses import dataclass, field

from nemo_ee.decoding.generated_sequence import SequenceStatistics
from nemo_ee.decoding.logprobs import TokenLogprobs


@dataclass
class Delta:
    """Tokens that are settled since the last time, and how the choice ended, if it did.

    Attributes:
        pieces: the text of each token; "" for special tokens and all but the last of one character.
        exit_layers: of each; `num_layers` for the final exit.
        confidences: of those exits.
        finish_reason: "stop" or "length"; None while it goes on.
        statistics: with `finish_reason`, what the sequence cost.
        logprobs: what the exits said of each token, if that is asked for; else empty.
        prompt_logprobs: once, of each token of the prompt, if that is asked for.
    """

    pieces: list[str] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    statistics: SequenceStatistics | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Of all its tokens."""
        return "".join(self.pieces)

    def extend(self, other: "Delta") -> None:
        """Appends what came after it."""
        self.pieces += other.pieces
        self.exit_layers += other.exit_layers
        self.confidences += other.confidences
        self.logprobs += other.logprobs
        self.prompt_logprobs += other.prompt_logprobs
        self.finish_reason, self.statistics = other.finish_reason, other.statistics
