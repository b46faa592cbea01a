# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Drawing the next token from logits over the vocabulary."""

from collections.abc import Sequence

import torch
from nemo.collections.nlp.modules.common.text_generation_utils import top_k_logits
from torch import Tensor

from nemo_ee.inference.request import SamplingOptions


def sample_tokens(
    logits: Tensor,
    options: SamplingOptions,
    texts: Sequence[Sequence[int]],
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token per sequence, [N].

    Args:
        logits: [N, V]; -inf for what cannot be emitted.
        options: how to choose.
        texts: N lists of the token ids so far, for the repetition penalty.
        generator: source of randomness, on the logits' device; None takes torch's default.
    """
    if options.use_greedy:
        return logits.argmax(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / options.temperature
    if options.repetition_penalty != 1.0:
        logits = penalise(logits, texts, options.repetition_penalty)
    logits = top_k_logits(logits, top_k=min(options.top_k, logits.shape[-1]), top_p=options.top_p)
    return torch.multinomial(logits.softmax(-1), num_samples=1, generator=generator).view(-1)


def penalise(logits: Tensor, texts: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Logits [N, V] with those of tokens in `texts` made less likely (CTRL, arXiv:1909.05858, section 4.1).

    A negative logit is multiplied: dividing it, as the paper's formula and NeMo do, would make it likelier.
    """
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, text in enumerate(texts):
        seen[row, torch.tensor(sorted(set(text)), device=logits.device)] = True
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
