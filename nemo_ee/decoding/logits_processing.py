# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What a request makes of logits before anything is decided by them: tokens that may not come, a repetition penalty.

Every exit's prediction is processed before its confidence is read, as the final exit's is: so an exit is as sure as it
is of the token that it would give. The order is that of transformers: processors first, then temperature, top-k, top-p.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_ee.decoding.prediction import Prediction
from nemo_ee.decoding.transfer import to_device


@dataclass(frozen=True)
class TokenSlot:
    """Where a token is to be chosen.

    Attributes:
        forbidden: tokens that may not come here.
        penalty: logits of the text's tokens are divided by it where positive and multiplied where negative
            (CTRL, arXiv:1909.05858, section 4.1; dividing a negative one, as the paper's formula and NeMo do, would
            make it likelier).
        text: token ids before it; only for a penalty, else empty.
        greedy: the most probable token is all that is asked for.
    """

    forbidden: tuple[int, ...] = ()
    penalty: float = 1.0
    text: Sequence[int] = ()
    greedy: bool = True

    @property
    def changes_logits(self) -> bool:
        """Whether logits here are others than the model's."""
        return bool(self.forbidden or self.text)

    def takes(self, token: int) -> bool:
        """Whether the model's most probable token is the choice here, whatever its logits."""
        return self.greedy and not self.text and token not in self.forbidden


def processed(prediction: Prediction, slots: Sequence[TokenSlot] | None, final: bool = False) -> Prediction:
    """The prediction of what may come, for N slots; None for slots that change nothing.

    Args:
        prediction: an exit's.
        slots: of its tokens.
        final: the final exit's, which is not asked whether it is sure: where its most probable token is what is asked
            for and may come, the confidence is that among all tokens, and where all are and the host knows it nothing
            is computed.

    Collectives: where TP > 1 and logits change, those of `Prediction.from_logits`.
    """
    if slots is None or not any(slot.changes_logits for slot in slots):
        return prediction
    if final and prediction.tokens.device.type == "cpu":
        best = prediction.tokens.tolist()
        if all(slot.takes(token) or not slot.changes_logits for slot, token in zip(slots, best, strict=True)):
            return prediction
    own, rows = prediction.logits, prediction.rows
    wide = torch.promote_types(own.dtype, torch.float32)
    padded = own.new_empty(
        len(own), own.shape[1] + 1, dtype=wide
    )  # the spare column: for tokens without a row here
    padded[:, :-1] = own
    padded[:, -1] = float("-inf")
    for logits, slot in zip(padded, slots, strict=True):
        if slot.text:
            columns = rows.columns(to_device(sorted(set(slot.text)), own.device), spare=own.shape[1])
            logits.index_copy_(0, columns, penalise(logits[columns], slot.penalty))
        if slot.forbidden:
            columns = rows.columns(to_device(list(slot.forbidden), own.device), spare=own.shape[1])
            logits.index_fill_(0, columns, float("-inf"))
    found = Prediction.from_logits(padded[:, :-1], rows).with_own(own)
    if not final:
        return found
    kept = to_device([slot.greedy and not slot.text for slot in slots], own.device)
    kept &= found.tokens == prediction.tokens
    return replace(
        found, confidence=torch.where(kept, prediction.confidence.to(found.confidence), found.confidence)
    )


def penalise(logits: Tensor, penalty: float) -> Tensor:
    """Logits of tokens that the text has already, made less likely; any shape."""
    return torch.where(logits > 0, logits / penalty, logits * penalty)
