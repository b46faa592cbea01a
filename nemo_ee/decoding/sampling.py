# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""From logits over the vocabulary to the next token.

Tokens are drawn by inversion: the same numbers give the same tokens on every tensor-parallel rank, and a sequence's
token depends on its own number only. On a CPU only tokens that may be drawn are sorted and summed
(`decoding.cpu.nucleus`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_ee.decoding.cpu.nucleus import Nucleus
from nemo_ee.decoding.request import SamplingOptions
from nemo_ee.decoding.transfer import to_device


def draw_tokens(logits: Tensor, options: SamplingOptions, uniforms: Sequence[float]) -> Tensor:
    """One token of each row, [N].

    Args:
        logits: [N, V]; -inf for what cannot be emitted.
        options: temperature, top-k and top-p of requests that sample.
        uniforms: [N] within [0, 1).
    """
    if logits.device.type != "cpu":
        return draw(token_distribution(logits, options), uniforms)
    rows = _tempered(logits, options).numpy()
    found = [Nucleus.of(row, options.top_k, options.top_p) for row in rows]
    return torch.tensor([nucleus.draw(u) for nucleus, u in zip(found, uniforms, strict=True)])


def token_distribution(logits: Tensor, options: SamplingOptions) -> Tensor:
    """The probabilities that tokens are drawn from, [N, V] in float32 or wider.

    Args:
        logits: see `draw_tokens`.
        options: likewise.
    """
    logits = _tempered(logits, options)
    if logits.device.type != "cpu":
        return keep_most_probable(logits, options.top_k, options.top_p).softmax(-1)
    out = torch.zeros_like(logits)
    for row, probabilities in zip(logits.numpy(), out.numpy(), strict=True):
        Nucleus.of(row, options.top_k, options.top_p).write(probabilities)
    return out


def _tempered(logits: Tensor, options: SamplingOptions) -> Tensor:
    """In float32 or wider."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if options.temperature == 1.0 else logits / options.temperature


def keep_most_probable(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [N, V] at -inf for what is not drawn: NeMo's `top_k_logits`, for all rows at once, without a wait.

    Args:
        logits: [N, V].
        top_k: keep the k highest and what equals the lowest of these; 0 or less keeps all.
        top_p: of these keep the most probable, the first of equal ones, until they have more than this probability; 0
            or 1 keeps all.
    """
    if top_k > 0:
        lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    if 0.0 < top_p < 1.0:
        ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
        enough = ordered.softmax(-1).cumsum(-1) > top_p
        ordered[:, 1:].masked_fill_(enough[:, :-1], float("-inf"))
        logits = logits.scatter(-1, tokens, ordered)
    return logits


def draw(probabilities: Tensor, uniforms: Sequence[float]) -> Tensor:
    """One token of each distribution, [N].

    Args:
        probabilities: [N, V]; sums need not be 1.
        uniforms: [N] within [0, 1).
    """
    cumulative = probabilities.to(torch.float64).cumsum(-1)
    target = to_device(uniforms, cumulative.device, torch.float64)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return tokens.clamp_max(probabilities.shape[-1] - 1)
