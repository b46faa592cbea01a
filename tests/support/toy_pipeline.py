# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A pipeline of tiny stages in one process, which runs many random global batches at once.

It simulates what `nemo_ee.training.bubble_schedule` and the exits' deferred losses do on a real one: stages keep
their own graphs, pass detached states forward and gradients back in the order of a `Plan`, add their losses'
gradients as these pass, and stop where the plan lets a fill stop. Every global batch has a copy of the parameters,
so one run gives one gradient per global batch.

Stage s maps h to tanh(W_s h); its exit has the loss |V_s h - y|^2 / 2 of the mapped state; the last exit is the
final one. Suffixes: N global batches, D width, K width of the targets.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_ee.training.bubble_plan import Plan

WIDTH, TARGETS = 3, 2
Gradients = dict[tuple[str, int], Tensor]


@dataclass(frozen=True)
class Division:
    """Factors of losses and gradients, as `Plan.loss_scale` (kind, stage) and `Plan.gradient_scale` (stage)."""

    loss_scale: Callable[[str, int], float]
    gradient_scale: Callable[[int], float]


@dataclass
class ToyPipeline:
    """One model and the random micro-batches of N global batches.

    Attributes:
        exit_weights: stage -> weight of its exit's loss; the last stage's is that of the final exit.
        parameters: ("stage" or "exit", stage) -> [D, D] or [K, D].
        inputs: [micro-batches, N, D].
        targets: [micro-batches, N, K].
    """

    exit_weights: Mapping[int, float]
    parameters: dict[tuple[str, int], Tensor]
    inputs: Tensor
    targets: Tensor

    @classmethod
    def random(
        cls, stages: int, exit_weights: Mapping[int, float], samples: int, batches: int, seed: int
    ) -> "ToyPipeline":
        """Parameters of order 1; inputs uniform on [-1, 2]; noisy targets that depend on the inputs."""
        generator = torch.Generator().manual_seed(seed)
        parameters = {("stage", s): (WIDTH, WIDTH) for s in range(stages)}
        parameters |= {("exit", s): (TARGETS, WIDTH) for s in exit_weights}
        drawn = {
            key: torch.randn(shape, generator=generator, dtype=torch.float64)
            for key, shape in parameters.items()
        }
        inputs = 3 * torch.rand(samples, batches, WIDTH, generator=generator, dtype=torch.float64) - 1
        noise = torch.rand(samples, batches, TARGETS, generator=generator, dtype=torch.float64)
        return cls(exit_weights, drawn, inputs, noise + inputs[..., :TARGETS].square())

    def step(self, plan: Plan, division: Division) -> Gradients:
        """Gradients [N, ...] of every parameter for N global batches that run by the plan."""
        own = self._copies()
        timetable = [(s, step) for s, passes in enumerate(plan.passes) for step in passes]
        returns = {(s, step.sample) for s, step in timetable if step.backward}
        states: dict[tuple[int, int], Tensor] = {}
        graphs: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        gradients: dict[tuple[int, int], Tensor] = {}
        for stage, step in sorted(timetable, key=lambda entry: (entry[1].start, entry[1].end)):
            here = (stage, step.sample)
            if step.backward:
                received, sent, loss = graphs.pop(here)
                if (stage + 1, step.sample) in gradients:
                    loss = loss + (sent * gradients.pop((stage + 1, step.sample))).sum()
                loss.backward()
                gradients[here] = received.grad
                continue
            received = states.pop((stage - 1, step.sample)) if stage else self.inputs[step.sample].clone()
            with torch.set_grad_enabled(here in returns):
                received.requires_grad_(here in returns)
                sent, loss = self._stage(own, stage, received, self.targets[step.sample])
                loss = loss * division.loss_scale(step.kind, stage) / plan.full
            states[here] = sent.detach()
            if here in returns:
                graphs[here] = received, sent, loss
        assert not graphs, "every pass that was to return has returned"
        return {key: copy.grad * division.gradient_scale(key[1]) for key, copy in own.items()}

    def written_objective(self, full: int) -> Gradients:
        """Plain autograd: gradients [N, ...] of the mean objective of the first `full` micro-batches."""
        own, total = self._copies(), 0.0
        stages = sum(kind == "stage" for kind, _ in own)
        for sample in range(full):
            state = self.inputs[sample]
            for stage in range(stages):
                state, loss = self._stage(own, stage, state, self.targets[sample])
                total = total + loss / full
        total.backward()
        return {key: copy.grad for key, copy in own.items()}

    def _copies(self) -> Gradients:
        batches = self.inputs.shape[1]
        return {
            key: p.expand(batches, *p.shape).clone().requires_grad_() for key, p in self.parameters.items()
        }

    def _stage(self, own: Gradients, stage: int, state: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The next state, and the weighted loss of the stage's exit, summed over global batches."""
        state = torch.einsum("nij,nj->ni", own["stage", stage], state).tanh()
        if stage not in self.exit_weights:
            return state, state.new_zeros(())
        error = torch.einsum("nij,nj->ni", own["exit", stage], state) - target
        return state, self.exit_weights[stage] * error.square().sum() / 2
