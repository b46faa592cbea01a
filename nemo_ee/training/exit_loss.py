# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Losses of exits and their gradients, in chunks of tokens, over a vocabulary sharded by tensor parallelism.

Logits are never kept: a chunk's logits, loss and gradient with respect to the exit's state are computed
together, in the same memory, so that besides the teacher's at most one exit's [C, R] of one chunk is kept at any
time. Nothing between chunks waits for the device. Suffixes: T tokens, C tokens of a chunk, H hidden size, R rows
of this rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from nemo_ee.config import ExitObjective
from nemo_ee.modeling.projection import ExitProjection, ProjectionWeights
from nemo_ee.modeling.row_summary import best_row, confidence
from nemo_ee.modeling.vocab_parallel import chunk_tokens, max_over_ranks, reduce_over_ranks, sum_over_ranks


class Statistic(IntEnum):
    """Places of an exit's sums over tokens that count, in a tensor that no one waits for."""

    LOSS = 0
    """Cross-entropy against the text, nats."""
    DIVERGENCE = 1
    """KL(final || exit), nats."""
    AGREEMENT = 2
    """Tokens whose most probable token is the final exit's."""
    CONFIDENCE = 3
    OBJECTIVE = 4
    """What the exit minimises; of the final exit its cross-entropy."""
    TOKENS = 5
    """How many these are."""


@dataclass
class ExitLossResult:
    """Sums over tokens with a loss mask, for one micro-batch; the same on all tensor-parallel ranks.

    Attributes:
        stats: exit layer (0 for the final exit) -> sums [one for each `Statistic`], float32 or wider.
        state_gradients: exit layer -> [T, H] gradient of the objective with respect to the exit's state,
            over this rank's rows only: still to be summed over the tensor-parallel group.
        parameter_gradients: weight of a projection -> its gradient, in float32 or wider, summed over exits.
        best_tokens: exit layer (0 for the final exit) -> [T] most probable emittable token.
    """

    stats: dict[int, Tensor] = field(default_factory=dict)
    state_gradients: dict[int, Tensor] = field(default_factory=dict)
    parameter_gradients: dict[Tensor, Tensor] = field(default_factory=dict)
    best_tokens: dict[int, Tensor] = field(default_factory=dict)

    def gradient_of(self, parameter: Tensor) -> Tensor:
        """What chunks add a parameter's gradient to: one buffer for all of them."""
        if parameter not in self.parameter_gradients:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            self.parameter_gradients[parameter] = torch.zeros_like(parameter, dtype=dtype)
        return self.parameter_gradients[parameter]


@dataclass(frozen=True)
class ExitInput:
    """One exit's part of `exit_losses`: its state [T, H], what projects it, and the weight of its loss."""

    state: Tensor
    projection: ExitProjection
    weight: float = 1.0


def exit_losses(
    exits: dict[int, ExitInput],
    output_weight: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor,
    objective: ExitObjective,
    teacher: ExitInput | None = None,
    scale: Tensor | float | None = None,
) -> ExitLossResult:
    """Losses, statistics and, with `scale`, gradients of several exits on one micro-batch.

    The objective is scale * weight * sum_t mask_t u_t (ce_weight CE_t + kl_weight KL_t + argmax_weight A_t),
    A_t being the cross-entropy against the final exit's most probable token and u_t being 1 or the exit's
    detached confidence. The tied output weight is differentiated too where it requires a gradient.

    Collectives: per chunk and exit three small all-reduces over the tensor-parallel group, of maxima, rows
    and sums of [C]; for a shortlist one of [H] with gradients, one of [C, rows] with a teacher; none where TP
    is 1.

    Args:
        exits: exit layer -> its state and projection.
        output_weight: the backbone's output weight [Vp/TP, H]; None where no projection is tied.
        labels: [T] next tokens.
        loss_mask: [T], 0 leaves a token out.
        objective: weights of the terms.
        teacher: the final exit, its state normed; required if the objective distils.
        scale: factor of the objective whose gradient is wanted; None computes statistics only.
    """
    assert teacher is not None or not objective.distils, "distillation needs the final exit's state"
    state = next(iter(exits.values())).state if exits else teacher.state
    mask = loss_mask.to(torch.promote_types(state.dtype, torch.float32))
    all_exits = ([0] if teacher else []) + list(exits)
    result = ExitLossResult(
        {n: mask.new_zeros(len(Statistic)) for n in all_exits},
        best_tokens={n: torch.empty_like(labels) for n in all_exits},
    )
    if scale is not None:
        result.state_gradients = {n: torch.empty_like(e.state) for n, e in exits.items()}
    projections = [item.projection for item in ([teacher] if teacher else []) + list(exits.values())]
    with torch.no_grad():
        # Gradients need the weights twice in each chunk, in the states' dtype; statistics once, in a wider one.
        dtype = None if scale is None else state.dtype
        tied = output_weight if output_weight is None or dtype is None else output_weight.to(dtype)
        weights = [projection(tied, dtype) for projection in projections]
        count = chunk_tokens(objective.loss_chunk_tokens, max((p.columns for p in projections), default=1))
        for start in range(0, len(labels), count):
            chunk = slice(start, start + count)
            final, of_exits = None, weights
            if teacher is not None:
                first, *of_exits = weights
                final = _Distribution(teacher.state[chunk], teacher.projection, first, [labels[chunk]])
                result.stats[0] += final.own_sums(mask[chunk])
                result.best_tokens[0][chunk] = final.best_token
            for (n, item), own in zip(exits.items(), of_exits, strict=True):
                parameter = output_weight if item.projection.weight is None else item.projection.weight
                _one_exit(
                    n,
                    item,
                    chunk,
                    own,
                    parameter,
                    labels[chunk],
                    mask[chunk],
                    objective,
                    final,
                    scale,
                    result,
                )
    return result


class _Distribution:
    """Softmax over sharded rows of one chunk, and what it makes of labels and of a target distribution.

    Collectives: three all-reduces, one of maxima, one of rows, one of sums.

    Args:
        state: [C, H].
        projection: what projects it.
        weights: of the projection.
        labels: tensors [C] of tokens whose cross-entropies are wanted.
        target: [C, R] probabilities of the same rows, if the divergence from it is wanted.

    Attributes:
        probabilities: [C, R] in float32 or wider, in the logits' memory.
        best: [C] the highest logit of a token that can be emitted.
        best_token: [C] that token.
        log_normaliser: [C].
        held: per tensor of labels, see `ExitProjection.held`.
        cross_entropies: per tensor of labels, [C] in nats.
        divergence: [C] KL(target, this) in nats; None without a target.
    """

    def __init__(
        self,
        state: Tensor,
        projection: ExitProjection,
        weights: ProjectionWeights,
        labels: Sequence[Tensor],
        target: Tensor | None = None,
    ):
        self.projection = projection
        logits = projection.logits(state, weights)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        best, row = best_row(logits, projection.emittable_rows())
        self.best, rows, highest = max_over_ranks(best, row + projection.first_row, logits.amax(-1))
        self.best_token = projection.tokens_of(rows)
        self.held = [projection.held(projection.rows_of(tokens)) for tokens in labels]
        parts = [logits.gather(-1, columns[:, None])[:, 0].where(here, 0) for columns, here in self.held]
        if target is not None:
            log_ratio = target.clamp_min(1e-30).log_().sub_(logits.clamp_min_(-1e30))
            parts.append(log_ratio.mul_(target).sum(-1))
            del log_ratio
        exponentials = logits.sub_(highest[:, None]).exp_()
        total, *sums = sum_over_ranks(exponentials.sum(-1), *parts)
        self.log_normaliser = highest + total.log()
        self.probabilities = exponentials.div_(total[:, None])
        self.cross_entropies = [self.log_normaliser - logit for logit in sums[: len(labels)]]
        self.divergence = None if target is None else sums[-1] + self.log_normaliser

    @property
    def confidence(self) -> Tensor:
        """[C], the highest probability of a token that can be emitted."""
        return confidence(self.best, self.log_normaliser)

    def own_sums(self, mask: Tensor) -> Tensor:
        """The final exit's sums (see `ExitLossResult`), of the first labels."""
        loss, tokens = self.cross_entropies[0] @ mask, mask.sum()
        return _sums(
            loss=loss,
            divergence=torch.zeros_like(loss),
            agreement=tokens,
            confidence=self.confidence @ mask,
            objective=loss,
            tokens=tokens,
        )

    def on_rows_of(self, projection: ExitProjection) -> Tensor:
        """On another projection's rows, [C, R]: a bucket takes what is off the shortlist."""
        if projection.kind != "shortlist":
            return self.probabilities
        columns, here = self.projection.held(projection.token_ids)
        selected = self.probabilities.index_select(-1, columns).mul_(here)
        rows = selected.new_zeros(len(selected), projection.num_rows + 1)
        rows[:, : selected.shape[1]] = selected
        rows[:, -1] = (self.probabilities.sum(-1) - selected.sum(-1)).clamp_min_(0)
        rows = reduce_over_ranks(rows)
        return rows[:, projection.first_row : projection.first_row + projection.columns]


def _sums(**values: Tensor) -> Tensor:
    """Scalars by the names of `Statistic`, one behind the other."""
    return torch.stack([values[each.name.lower()] for each in Statistic])


def _one_exit(
    n: int,
    item: ExitInput,
    chunk: slice,
    weights: ProjectionWeights,
    parameter: Tensor,
    labels: Tensor,
    mask: Tensor,
    objective: ExitObjective,
    final: _Distribution | None,
    scale: Tensor | float | None,
    result: ExitLossResult,
) -> None:
    """One chunk of one exit, whose rows are `parameter`; adds to `result`."""
    state, projection = item.state[chunk], item.projection
    wanted, target = [labels], None
    if final is not None:
        wanted, target = [labels, final.best_token], final.on_rows_of(projection)
    mine = _Distribution(state, projection, weights, wanted, target)
    ce = mine.cross_entropies[0]
    kl = torch.zeros_like(ce) if final is None else mine.divergence
    hard = torch.zeros_like(ce) if final is None else mine.cross_entropies[1]
    confidence = mine.confidence
    agreement = torch.zeros_like(ce) if final is None else (mine.best_token == final.best_token).to(ce.dtype)
    token_weight = mask * confidence if objective.token_weighting == "confidence" else mask
    loss = objective.ce_weight * ce + objective.kl_weight * kl + objective.argmax_weight * hard
    result.stats[n] += _sums(
        loss=ce @ mask,
        divergence=kl @ mask,
        agreement=agreement @ mask,
        confidence=confidence @ mask,
        objective=loss @ token_weight,
        tokens=mask.sum(),
    )
    result.best_tokens[n][chunk] = mine.best_token
    if scale is None:
        return
    gradient = mine.probabilities.mul_(objective.ce_weight + objective.kl_weight + objective.argmax_weight)
    for (columns, here), term in zip(mine.held, (objective.ce_weight, objective.argmax_weight), strict=False):
        if term:
            gradient.scatter_add_(-1, columns[:, None], here[:, None].to(gradient.dtype) * -term)
    if objective.kl_weight:
        gradient.sub_(target, alpha=objective.kl_weight)
    gradient *= (token_weight * (item.weight * scale))[:, None]
    rows = gradient[:, : projection.rows_per_rank].to(state.dtype)
    state_gradient = result.state_gradients[n][chunk]
    torch.mm(rows, weights.rows, out=state_gradient)
    if parameter.requires_grad:
        whole = result.gradient_of(parameter)
        if rows.dtype == whole.dtype:
            whole.addmm_(rows.T, state)
        else:
            whole += rows.T @ state
    if projection.kind == "shortlist":
        bucket = gradient[:, -1] if projection.holds_bucket else torch.zeros_like(gradient[:, 0])
        state_gradient.addr_(bucket.to(state.dtype), weights.bucket_weight)
        both = torch.cat([bucket @ state.to(bucket.dtype), bucket.sum()[None]])
        reduce_over_ranks(both)
        result.gradient_of(projection.bucket_weight).add_(both[:-1])
        result.gradient_of(projection.bucket_bias).add_(both[-1:])
