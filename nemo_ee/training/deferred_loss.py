# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Losses of exits while the backbone trains: back-propagated where they arise, by any schedule.

The deferred exit loss is the identity on the hidden state behind an exit layer. Its backward receives the
gradient g from the layers above, computes the exit's loss and its gradient *then*, and returns g plus that
gradient. The sum over stages is the gradient of the whole objective (EE-LLM's auxiliary loss
L_s + <g_s, x_s>, arXiv:2312.04916 section 3.1, stated locally), so Megatron's schedules carry it, and only
one micro-batch's exit logits are ever alive, one chunk of tokens at a time.

All parameters of a head are inputs of the Function and their gradients its outputs. So autograd itself adds
up a weight that several exits, the embedding and the output layer share, and runs its hooks once per
micro-batch, which is what Megatron's overlapped gradient reduction asserts.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from nemo_ee.config import ExitObjective
from nemo_ee.modeling.heads import ExitHead, ExitSurroundings
from nemo_ee.modeling.layer_dropout import LayerDropout
from nemo_ee.modeling.token_layout import by_position, own_share, whole_tokens
from nemo_ee.training.exit_loss import ExitInput, ExitLossResult, exit_losses


@dataclass(frozen=True)
class ExitTargets:
    """What the exits of one micro-batch learn from; on every stage that holds an exit.

    Attributes:
        labels: [B, S] next tokens.
        loss_mask: [B, S], 0 leaves a token out.
        weights: exit layer -> weight of its loss in this step. Exits of weight 0 are not computed.
        objective: what each exit minimises; nothing of the final exit is known here.
        scale: factor of the mean loss per token, evaluated when the gradient is: 1 / number of micro-batches
            times the loss scale of half precision.
        record: called with each exit's sums: when the gradient is computed, or at once without one.
        layer_dropout: which samples skip which layers; None drops nothing.
    """

    labels: Tensor
    loss_mask: Tensor
    weights: dict[int, float]
    objective: ExitObjective
    scale: Callable[[], Tensor | float]
    record: Callable[[ExitLossResult], None]
    layer_dropout: LayerDropout | None = None

    def attach(
        self, head: ExitHead, hidden: Tensor, output_weight: Tensor | None, surroundings: ExitSurroundings
    ) -> Tensor:
        """Attaches an exit's loss to the hidden state behind its layer.

        Args:
            head: the exit.
            hidden: [S, B, H] (S/TP under sequence parallelism).
            output_weight: the backbone's output weight [Vp/TP, H], for tied projections.
            surroundings: for a head with a block.

        Returns:
            The hidden state, to go on with. Without gradients (validation) the loss is computed at once.
        """
        tied = [] if output_weight is None or head.projection.kind != "tied" else [output_weight]
        parameters = [p for p in [*head.parameters(), *tied] if p.requires_grad]
        evaluate = _Evaluation(
            head, output_weight, self, surroundings, _autocast_dtype(hidden), head.config.sequence_parallel
        )
        if not torch.is_grad_enabled():
            evaluate.statistics(hidden)
            return hidden
        out = _DeferredExitLoss.apply(hidden, evaluate, *parameters)
        # A stage's output must not be a view: Megatron frees its storage once it has been sent.
        return make_viewless_tensor(out, True, True)


class _DeferredExitLoss(torch.autograd.Function):
    """Identity on the hidden state; see the module's text."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, evaluate: "_Evaluation", *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.evaluate, ctx.parameters = evaluate, parameters
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        (hidden,) = ctx.saved_tensors
        own, of_parameters = ctx.evaluate.gradients(hidden, ctx.parameters)
        return gradient if own is None else gradient + own, None, *of_parameters


@dataclass(frozen=True)
class _Evaluation:
    """One exit on one micro-batch, to be computed once, now or later."""

    head: ExitHead
    output_weight: Tensor | None
    targets: ExitTargets
    surroundings: ExitSurroundings
    autocast_dtype: torch.dtype | None
    sequence_parallel: bool

    def statistics(self, hidden: Tensor) -> None:
        """Records sums in float32 or wider: logits in half precision have many equal maxima.

        A forward pass runs under autocast, which would take the sums over tokens, too, in half precision.
        """
        state = self._state(hidden)
        wide = torch.promote_types(state.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            self.targets.record(self._losses(state.to(wide), self.output_weight, None))

    def gradients(self, hidden: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor | None, list[Tensor]]:
        """Gradients of the weighted loss with respect to the hidden state and to `parameters`."""
        weight = self.targets.weights[self.head.layer]
        if weight == 0:
            return None, [torch.zeros_like(p) for p in parameters]
        with torch.enable_grad():
            x = hidden.detach().requires_grad_()
            state = self._state(x)
        scale = self.targets.scale() / self.targets.loss_mask.sum().clamp_min(1)
        result = self._losses(state.detach(), self.output_weight, scale)
        self.targets.record(result)
        gradient = own_share(result.state_gradients[self.head.layer], state, self.sequence_parallel)
        direct = result.parameter_gradients
        found = torch.autograd.grad(state, [x, *parameters], gradient, allow_unused=True)
        of_parameters = []
        for parameter, through_state in zip(parameters, found[1:], strict=True):
            parts = [g.to(parameter.dtype) for g in (through_state, direct.get(parameter)) if g is not None]
            of_parameters.append(sum(parts[1:], parts[0]) if parts else torch.zeros_like(parameter))
        return found[0], of_parameters

    def _state(self, hidden: Tensor) -> Tensor:
        device, dtype = hidden.device.type, self.autocast_dtype
        with torch.autocast(device, dtype) if dtype is not None else nullcontext():
            around = self.surroundings
            state = self.head(hidden, around.attention_mask, around.rotary_pos_emb, around.packed_seq_params)
        return state if dtype is None else state.to(dtype)

    def _losses(self, state: Tensor, output_weight: Tensor | None, scale: Tensor | None) -> ExitLossResult:
        n, targets = self.head.layer, self.targets
        return exit_losses(
            {
                n: ExitInput(
                    whole_tokens(state, self.sequence_parallel), self.head.projection, targets.weights[n]
                )
            },
            output_weight,
            by_position(targets.labels),
            by_position(targets.loss_mask),
            targets.objective,
            None,
            scale,
        )


def _autocast_dtype(like: Tensor) -> torch.dtype | None:
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
