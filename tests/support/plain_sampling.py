# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Top-k, top-p and drawing as plainly as can be: the whole vocabulary is sorted, and summed in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor


def plain_distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """[N, V] probabilities that tokens are drawn from."""
    logits = logits / temperature
    if top_k > 0:
        lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    if 0.0 < top_p < 1.0:
        ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
        enough = ordered.softmax(-1).cumsum(-1) > top_p
        ordered[:, 1:].masked_fill_(enough[:, :-1], float("-inf"))
        logits = logits.scatter(-1, tokens, ordered)
    return logits.softmax(-1)


def plain_draw(probabilities: Tensor, uniforms: Sequence[float]) -> Tensor:
    """[N] tokens, by inversion in the vocabulary's order."""
    cumulative = probabilities.double().cumsum(-1)
    target = torch.tensor(uniforms, dtype=torch.float64)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_max(probabilities.shape[-1] - 1)
