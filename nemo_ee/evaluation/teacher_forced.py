# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What every exit says about given text, token by token (teacher-forced).

Suffixes: B sequences, S tokens of a sequence, T tokens of all sequences in the order of hidden states
(S x B), H hidden size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_ee.decoding.layers.lean_head import Readout
from nemo_ee.decoding.leaving import leaves
from nemo_ee.modeling.gpt import EarlyExitGPTModel, StageStates
from nemo_ee.modeling.projection import ExitProjection
from nemo_ee.modeling.row_summary import summarise_rows
from nemo_ee.modeling.vocab_parallel import chunk_tokens, reduce_over_ranks

CONFIDENCE_RULE = "max_probability"
"""By which text is scored: the probability of an exit's most probable token."""


@dataclass(frozen=True)
class ExitScores:
    """One exit's predictions of B x S next tokens, all [B, S].

    Attributes:
        tokens: the most probable token that the exit can emit; a shortlist's bucket is never emitted.
        confidences: its probability.
        losses: cross-entropy against the labels, nats. Labels off a shortlist count as its bucket.
        bucket_wins: whether the bucket is more probable than any token; False without a shortlist.
    """

    tokens: Tensor
    confidences: Tensor
    losses: Tensor
    bucket_wins: Tensor


@dataclass(frozen=True)
class TextScores:
    """All exits' predictions of one text; `final` is the final exit's, `exits` is keyed by exit layer."""

    final: ExitScores
    exits: dict[int, ExitScores]

    def leaving(self, thresholds: dict[int, float]) -> tuple[Tensor, Tensor]:
        """What decoding with these thresholds would do at each position, given the text before it.

        Args:
            thresholds: exit layer -> threshold, for the exits in use.

        Returns:
            Tokens [B, S], and the layer of the exit that each comes from [B, S], 0 for the final exit.
        """
        tokens, layers = self.final.tokens.clone(), torch.zeros_like(self.final.tokens)
        for n in sorted(thresholds, reverse=True):
            exit_ = self.exits[n]
            sure = leaves(exit_.confidences.double(), thresholds[n])
            tokens, layers = torch.where(sure, exit_.tokens, tokens), layers.masked_fill(sure, n)
        return tokens, layers


def score_text(
    gpt: EarlyExitGPTModel, tokens: Tensor, labels: Tensor, heads: Mapping[int, Readout] | None = None
) -> TextScores:
    """Predictions of the final exit and of every exit on one batch of text, computed in float32 or wider.

    Call it in eval mode without gradients. Every position sees the ones before it; padding may follow.
    Collectives: those of the backbone and of the softmax over the tensor-parallel group.

    Args:
        gpt: the whole model, on one pipeline stage.
        tokens: [B, S].
        labels: [B, S], the tokens that follow.
        heads: exit layer -> the head, behind its block, that stands for the module's: see `asked_heads`.
    """
    heads = heads or {}
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    states = gpt.forward_states(tokens, positions, None)
    final = score_final(gpt, states.output, labels)
    exits = {n: score_exit(gpt, n, states, labels, heads.get(n)) for n in gpt.exit_layers}
    return TextScores(final, exits)


def score_final(gpt: EarlyExitGPTModel, state: Tensor, labels: Tensor) -> ExitScores:
    """The final exit's predictions from its normed state [S, B, H]."""
    projection = gpt.final_projection
    return _score(state, _logits_of(projection, gpt), projection, gpt, labels)


def score_exit(
    gpt: EarlyExitGPTModel,
    layer: int,
    states: StageStates,
    labels: Tensor,
    head: Readout | None = None,
    places: Callable[[Tensor], Tensor] = lambda state: state,
) -> ExitScores:
    """One exit's predictions from what a forward pass left; `head` as in `score_text`.

    Args:
        gpt: the whole model, on one pipeline stage.
        layer: of the exit.
        states: of the pass.
        labels: [B, S], of what `places` picks.
        head: see `score_text`.
        places: [S, B, H] behind the exit's block -> the states that are asked for, of that form.
    """
    module = gpt.exits[str(layer)]
    dtype = next(module.parameters(), states.output).dtype
    hidden = states.exits[layer].to(dtype)
    state = places(module.behind_block(hidden, attention_mask=None, rotary_pos_emb=states.rotary_pos_emb))
    logits_of = _logits_of(module.projection, gpt) if head is None else head.logits
    return _score(module.readout(state) if head is None else state, logits_of, module.projection, gpt, labels)


def _logits_of(projection: ExitProjection, gpt: EarlyExitGPTModel) -> Callable[[Tensor], Tensor]:
    weight = gpt.output_weight() if projection.weight is None else None
    return lambda state: projection.local_logits(state, weight)


def _score(
    state: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    projection: ExitProjection,
    gpt: EarlyExitGPTModel,
    labels: Tensor,
) -> ExitScores:
    """Of states [S, B, H] by what makes logits of them, [T, H] -> [T, columns]."""
    length, batch, size = state.shape
    wide = torch.promote_types(state.dtype, torch.float32)
    chunk = chunk_tokens(gpt.early_exit.tuning.loss_chunk_tokens, projection.columns)
    with torch.autocast(state.device.type, enabled=False):
        pieces = [
            _score_tokens(logits_of(rows), projection, wanted)
            for rows, wanted in zip(
                state.to(wide).reshape(-1, size).split(chunk),
                labels.t().reshape(-1).split(chunk),
                strict=True,
            )
        ]
    joined = (torch.cat(column).view(length, batch).t() for column in zip(*pieces, strict=True))
    return ExitScores(*joined)


def _score_tokens(
    logits: Tensor, projection: ExitProjection, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `ExitScores`, [T] each, from logits [T, columns]."""
    summary = summarise_rows(logits, projection.emittable_rows())
    whole, highest = summary.over_ranks(projection.first_row, logits.amax(-1))
    columns, held = projection.held(projection.rows_of(labels))
    label_logits = logits.gather(-1, columns[:, None])[:, 0].where(held, 0.0)
    losses = whole.log_sum - reduce_over_ranks(label_logits)
    return projection.tokens_of(whole.row), whole.confidence, losses, highest > whole.best
