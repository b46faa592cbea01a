# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Greedy early-exit generation without any cache: the model's own forward on the whole text at every step."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Reference:
    """Generated tokens, the exit of each and its confidence, and how near the decisions were.

    Attributes:
        margins: per token, the smallest of |confidence - threshold| over the exits asked and the gap between
            the two highest logits of the exit that answered.
    """

    tokens: list[int] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)


@torch.no_grad()
def generate_uncached(
    gpt: Any,
    prompt: list[int],
    steps: int,
    exits: dict[int, float] | list[dict[int, float]],
    max_pending: int | None = None,
) -> Reference:
    """`steps` tokens after `prompt`; tensor parallel size 1 only.

    Args:
        gpt: an `EarlyExitGPTModel` in eval mode.
        prompt: token ids.
        steps: tokens to generate.
        exits: exit layer -> threshold; or one such mapping per step.
        max_pending: at most so many tokens in a row may leave at or before an exit.
    """
    reference, text = Reference(), list(prompt)
    for step in range(steps):
        ids = torch.tensor([text])
        states = gpt.forward_states(ids, torch.arange(len(text))[None], None)
        answer, margin = None, float("inf")
        asked = exits if isinstance(exits, dict) else exits[step]
        for layer, threshold in sorted(asked.items()) if step else []:
            waiting = 1 + _streak(reference.exit_layers, layer)
            if max_pending is not None and waiting > max_pending:
                continue
            head = gpt.exits[str(layer)]
            state = head(states.exits[layer], None, states.rotary_pos_emb)[-1]
            probabilities = head.projection.local_logits(state, gpt.output_weight())[0].softmax(-1)
            kept = probabilities[: head.projection.num_kept]
            sure, row = kept.max(-1)
            margin = min(margin, abs(sure.item() - threshold))
            if sure > threshold:
                answer = head.projection.tokens_of(row).item(), layer, sure.item()
                margin = min(margin, _gap(kept.log()))
                break
        if answer is None:
            logits = (states.output[-1, 0] @ gpt.output_weight().T)[: gpt.true_vocab_size]
            answer = logits.argmax().item(), gpt.config.num_layers, logits.softmax(-1).max().item()
            margin = min(margin, _gap(logits))
        for values, value in zip(
            (reference.tokens, reference.exit_layers, reference.confidences, reference.margins),
            (*answer, margin),
            strict=True,
        ):
            values.append(value)
        text.append(answer[0])
    return reference


def exit_log_probs(model: Any, layer: int, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [B, S, V + 1] of one exit, the bucket last; -inf where it has no row."""
    gpt, vocabulary = model.gpt, model.gpt.true_vocab_size
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    states = gpt.forward_states(ids, positions, None)
    head = gpt.exits[str(layer)]
    state = head(states.exits[layer], None, states.rotary_pos_emb).transpose(0, 1)
    projection = head.projection
    whole = torch.full((*ids.shape, vocabulary + 1), -math.inf, dtype=torch.float64)
    if projection.kind == "shortlist":
        kept = projection.token_ids
        whole[..., kept] = state @ projection.weight[: len(kept)].T
        whole[..., -1] = state @ projection.bucket_weight + projection.bucket_bias
    else:
        whole[..., :vocabulary] = (state @ projection.weight.T)[..., :vocabulary]
    return whole.log_softmax(-1)


def _streak(exit_layers: list[int], layer: int) -> int:
    """How many of the last tokens in a row left at `layer` or before."""
    count = 0
    for past in reversed(exit_layers):
        if past > layer:
            break
        count += 1
    return count


def _gap(logits: torch.Tensor) -> float:
    first, second = logits.topk(2).values.tolist()
    return first - second
