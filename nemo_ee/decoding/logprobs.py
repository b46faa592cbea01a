# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What is kept of a prediction, for sequences that ask: log-probabilities of a token and of the most probable ones.

They are the model's own, whatever a request makes of its logits (temperature, top-k, top-p, a penalty, tokens that may
not come yet), over the whole vocabulary and in float32 or wider. An exit with a shortlist has a bucket for all other
tokens, and its mass counts: so a greedy token's probability is the exit's confidence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nemo_ee.decoding.transfer import to_device, to_host

POSITIONS = 256
"""Of a prompt that is scored: as many have logits at once."""


@dataclass(frozen=True)
class TokenLogprobs:
    """What one prediction says of the token that came.

    Attributes:
        token: its id.
        logprob: of it, nats.
        top: the most probable tokens and their log-probabilities, the most probable first; fewer than were asked for
            where an exit cannot emit as many.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]

    def plain(self) -> dict[str, object]:
        """For dictionaries and JSON."""
        ids, values = [token for token, _ in self.top], [value for _, value in self.top]
        return {
            "token_id": self.token,
            "logprob": self.logprob,
            "top_token_ids": ids,
            "top_logprobs": values,
        }


def summarised(logits: Tensor, normaliser: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """What n predictions say of a token each. Waits for the device once.

    Args:
        logits: [n, V]; -inf for what cannot be emitted.
        normaliser: [n] see `Prediction.own_normaliser`.
        tokens: [n] ids below V.
        top: how many of the most probable tokens are kept; 0 or more.
    """
    count, normaliser = min(top, logits.shape[-1]), normaliser[:, None]
    given = logits.gather(1, to_device(list(tokens), logits.device)[:, None]) - normaliser
    best, ids = logits.topk(count)
    found, values, names = to_host(given.flatten(), (best - normaliser).flatten(), ids.flatten())
    pairs = list(zip(names, values, strict=True))
    return [
        TokenLogprobs(
            token,
            found[i],
            tuple(pair for pair in pairs[i * count : (i + 1) * count] if pair[1] > float("-inf")),
        )
        for i, token in enumerate(tokens)
    ]
