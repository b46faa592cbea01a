# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""From logits over the vocabulary to the next token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_ee.decoding.request import SamplingOptions
from nemo_ee.decoding.transfer import to_device


def token_distribution(logits: Tensor, options: SamplingOptions, texts: Sequence[Sequence[int]]) -> Tensor:
    """The probabilities that tokens are drawn from, [N, V] in float32 or wider.

    Args:
        logits: [N, V]; -inf for what cannot be emitted.
        options: temperature, penalty, top-k and top-p; for greedy choices the distribution is one token.
        texts: N lists of the token ids so far, for the repetition penalty.
    """
    if options.use_greedy:
        certain = torch.zeros_like(logits, dtype=torch.float32)
        return certain.scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / options.temperature
    if options.repetition_penalty != 1.0:
        logits = penalise(logits, texts, options.repetition_penalty)
    return keep_most_probable(logits, options.top_k, options.top_p).softmax(-1)


def keep_most_probable(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [N, V] at -inf for what is not drawn: NeMo's `top_k_logits`, for all rows at once.

    Args:
        logits: [N, V].
        top_k: keep the k highest and what equals the lowest of these; 0 keeps all.
        top_p: of these keep the most probable until they have more than this probability; 0 or 1 keeps all.
    """
    if top_k > 0:
        lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    if 0.0 < top_p < 1.0:
        ordered, tokens = logits.sort(dim=-1, descending=True)
        enough = ordered.softmax(-1).cumsum(-1) > top_p
        ordered[:, 1:].masked_fill_(enough[:, :-1], float("-inf"))
        logits = logits.scatter(-1, tokens, ordered)
    return logits


def draw(probabilities: Tensor, uniforms: Sequence[float]) -> Tensor:
    """One token of each distribution, [N], by inversion.

    The same numbers give the same tokens on every tensor-parallel rank, and a sequence's token depends on its
    own number only.

    Args:
        probabilities: [N, V]; sums need not be 1.
        uniforms: [N] within [0, 1).
    """
    cumulative = probabilities.to(torch.float64).cumsum(-1)
    target = to_device(uniforms, cumulative.device, torch.float64)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return tokens.clamp_max(probabilities.shape[-1] - 1)


def penalise(logits: Tensor, texts: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Logits [N, V] with those of tokens in `texts` made less likely (CTRL, arXiv:1909.05858, section 4.1).

    A negative logit is multiplied: dividing it, as the paper's formula and NeMo do, would make it likelier.
    """
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, text in enumerate(texts):
        seen[row].index_fill_(0, to_device(sorted(set(text)), logits.device), True)  # by index it would wait
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
