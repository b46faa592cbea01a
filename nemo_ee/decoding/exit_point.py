# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""One exit of a decoder: its head, and the hidden states that wait there.

Suffixes: T tokens of a pack, N sequences, H hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_ee.decoding.confidence_rules import ConfidenceRule, ExitEvidence
from nemo_ee.decoding.cuda.segment_graphs import EagerPasses
from nemo_ee.decoding.decoding_model import DecodingModel
from nemo_ee.decoding.layers.packed_tokens import PackedTokens
from nemo_ee.decoding.logits_processing import TokenSlot, processed
from nemo_ee.decoding.prediction import Prediction
from nemo_ee.decoding.transfer import to_device, to_host


class Trail:
    """What the exits before said about the tokens of one step, for rules that look back.

    Args:
        count: N.
        hidden: an example of a hidden state.
    """

    def __init__(self, count: int, hidden: Tensor):
        self.hidden = hidden.new_zeros(count, hidden.shape[-1])
        self.tokens = torch.full((count,), -1, device=hidden.device)
        self.agreeing = torch.zeros(count, dtype=torch.long, device=hidden.device)

    def evidence(self, prediction: Prediction, hidden: Tensor, indices: list[int]) -> ExitEvidence:
        """Of the tokens with these indices; then remembers them."""
        index = to_device(indices, hidden.device)
        same = self.tokens[index] == prediction.tokens
        agreeing = torch.where(same, self.agreeing[index], 0) + 1
        evidence = ExitEvidence(prediction, hidden, self.hidden[index], agreeing)
        self.hidden[index], self.tokens[index], self.agreeing[index] = hidden, prediction.tokens, agreeing
        return evidence


class ExitPoint:
    """One exit in use.

    Args:
        model: that it belongs to.
        layer: its layer.
        rule: how sure it is.
        passes: run the block and the head.

    Attributes:
        hidden: [rows, positions, H] states behind the layer, which the segment before the exit keeps.
    """

    def __init__(
        self,
        model: DecodingModel,
        layer: int,
        rule: ConfidenceRule,
        passes: EagerPasses,
    ):
        self.head, self.layer, self.rule = model.heads[layer], layer, rule
        self._passes = passes
        self.block, self.hidden = passes.memory.blocks[layer], passes.memory.hidden[layer]

    def clear_row(self, row: int, length: int) -> None:
        """Makes the block's first `length` keys of a row zeros."""
        if self.block is not None:
            self.block.clear_row(row, length)

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the block's keys of one row to another."""
        if self.block is not None:
            self.block.move(source, target, length)

    def pending(self, packed: PackedTokens) -> Tensor:
        """The hidden states [T, H] of the tokens of a pack."""
        if packed.single:
            return self.hidden[packed.rows[0], packed.starts[0] : packed.length]
        return self.hidden[packed.token_rows, packed.positions]

    def enter_block(self, x: Tensor, packed: PackedTokens) -> Tensor:
        """The head's block, if it has one, on the tokens of a pack, all from the first that it has not seen."""
        if self.block is None:
            return x
        return self._passes.run_block(self.layer, x.to(self.head.dtype), packed)

    def fill_block(self, x: Tensor, packed: PackedTokens) -> None:
        """Writes the keys of the head's block, if it has one, for prompts: passes too long to be captured."""
        if self.block is not None:
            self.block(x.to(self.head.dtype), packed)

    def predict(
        self,
        x: Tensor,
        inside: Tensor,
        indices: list[int],
        trail: Trail | None,
        slots: Sequence[TokenSlot] | None = None,
    ) -> tuple[Prediction, list[float], list[int]]:
        """The head's prediction, how sure it is and its most probable tokens, for the tokens with these indices in
        the step. Waits for the device once.

        Args:
            x: [N, H] the hidden states.
            inside: [N, H] behind the block.
            indices: N of the step's tokens.
            trail: of the step, for rules that look back.
            slots: N, see `processed`.
        """
        prediction = processed(self._passes.predict(f"exit {self.layer}", self.head, inside), slots)
        evidence = ExitEvidence(prediction, x) if trail is None else trail.evidence(prediction, x, indices)
        sure, tokens = to_host(self.rule.sureness(evidence), prediction.tokens)
        return prediction, sure, tokens
