# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""How good what was generated is, judged by the full model.

Suffixes: B sequences of equal length, P tokens of their prompts, n generated tokens each.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nemo_ee.evaluation.teacher_forced import ExitScores, TextScores, score_exit, score_final
from nemo_ee.inference.generate import generating

Tokens = list[list[int]]


@dataclass
class Quality:
    """Sums over the texts of one way.

    Attributes:
        agreed: tokens on which it agrees with full depth, given the same text before them.
        compared: tokens compared.
        loss: nats of the generated tokens under the full model.
        tokens: how many those are.
        gaps: of every text that leaves full depth's, at the first token that does: how much higher the full
            model's logit of its own token is than that of this one. Small ones are rounding.
    """

    agreed: int = 0
    compared: int = 0
    loss: float = 0.0
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)


class Judge:
    """Compares with full depth's continuations of the same prompts.

    Args:
        model: a `MegatronGPTEarlyExitModel`.
        prompts: B lists of P token ids.
        reference: full depth's B continuations by n tokens.
    """

    def __init__(self, model: Any, prompts: Tokens, reference: Tokens):
        self.model, self.prompts, self.reference = model, prompts, reference
        self.scores, self.output = self._score(reference, with_exits=True)

    def exits(self, threshold: float, texts: Tokens, into: Quality) -> None:
        """Adds exits at a threshold. Agreement is teacher-forced: on full depth's text, what would decoding
        say at every token? The first comes from the final exit and does not count."""
        thresholds = dict.fromkeys(self.model.early_exit.layers, threshold)
        tokens, layers = self.scores.leaving(thresholds)
        labels = torch.tensor(self.reference, device=tokens.device)
        # The final exit's token is the label but for rounding between decoding and this pass.
        equal = ((tokens == labels) | (layers == 0))[:, 1:]
        into.agreed += int(equal.sum())
        into.compared += equal.numel()
        self._add_loss(texts, into)

    def whole(self, texts: Tokens, into: Quality) -> None:
        """Adds a way that says something of its own at every token. Each text counts up to its first token
        that is not full depth's: so far the text before a token is the same."""
        for row, (text, wanted) in enumerate(zip(texts, self.reference, strict=True)):
            unequal = [i for i, pair in enumerate(zip(text, wanted, strict=True)) if pair[0] != pair[1]]
            into.agreed += unequal[0] if unequal else len(wanted)
            into.compared += unequal[0] + 1 if unequal else len(wanted)
            if unequal:
                into.gaps.append(self._gap(row, unequal[0], text[unequal[0]]))
        self._add_loss(texts, into)

    def _add_loss(self, texts: Tokens, into: Quality) -> None:
        scores = self.scores if texts == self.reference else self._score(texts, with_exits=False)[0]
        into.loss += scores.final.losses.double().sum().item()
        into.tokens += scores.final.losses.numel()

    def _gap(self, row: int, index: int, token: int) -> float:
        """How much higher the full model's logit of its own token is than that of another."""
        with torch.inference_mode():
            weight = self.model.gpt.output_weight()
            state = self.output[index, row].to(weight.dtype)
            own, other = (weight[[self.reference[row][index], token]] @ state).tolist()
        return own - other

    def _score(self, texts: Tokens, with_exits: bool) -> tuple[TextScores, Tensor]:
        """Scores of the generated tokens, [B, n], and the full model's states that they come from,
        [n, B, H]."""
        gpt, first = self.model.gpt, len(self.prompts[0]) - 1
        device = gpt.output_weight().device
        whole = [prompt + text for prompt, text in zip(self.prompts, texts, strict=True)]
        ids = torch.tensor(whole, device=device)
        tokens, labels = ids[:, :-1], ids[:, 1:]
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        with generating(self.model):
            states = gpt.forward_states(tokens, positions, None)
            output = states.output[first:]
            final = score_final(gpt, output, labels[:, first:])
            layers = gpt.exit_layers if with_exits else ()
            found = {n: _cut(score_exit(gpt, n, states, labels), first) for n in layers}
        return TextScores(final, found), output


def _cut(scores: ExitScores, first: int) -> ExitScores:
    return replace(scores, **{name: values[:, first:] for name, values in vars(scores).items()})
