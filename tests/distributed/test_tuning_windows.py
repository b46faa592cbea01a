# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Tuning with distillation over several stages keeps the states of one window of micro-batches, and no more."""

import weakref
from dataclasses import replace

import pytest
import torch

from tests.support.tiny_gpt import tiny_model, tiny_model_config

LENGTH, ROWS, BATCHES = 16, 2, 11
HEAD = dict(mlp=False, norm=True, linear=True, projection="shortlist", shortlist_size=61)


def step(stages: int, windows: list[int]) -> dict[int, tuple]:
    """One global batch with each size of windows: gradients, sums, and the most states alive at one time."""
    from nemo_ee.head_config import HeadConfig
    from nemo_ee.modeling.projection import ExitProjection
    from nemo_ee.training import tuning_step

    uneven = dict(num_layers_in_first_pipeline_stage=2) if stages == 3 else {}
    model = tiny_model(
        tiny_model_config(pp=stages, exits=[2, 4, 6, 7], head=HEAD, **uneven), stages, torch.float64
    )
    gpt = model.gpt
    for part in gpt.modules():
        if getattr(part, "config", None) is not None:
            part.config.params_dtype = part.config.pipeline_dtype = torch.float64
    teacher = ExitProjection(
        gpt.config, HeadConfig(projection="tied"), gpt.true_vocab_size, model.padded_vocab_size
    )
    generator = torch.Generator().manual_seed(2)
    batches = []
    for _ in range(BATCHES):
        ids = torch.randint(0, gpt.true_vocab_size, (ROWS, LENGTH + 1), generator=generator)
        mask = (torch.rand(ROWS, LENGTH, generator=generator) > 0.25).double()
        positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
        batches.append(tuning_step.MicroBatch(ids[:, :-1], ids[:, 1:].contiguous(), mask, positions))
    plain = gpt.forward_states

    class Exits(dict):
        """Of `StageStates`; what a weak reference can follow."""

    def forward_states(*args, **kwargs):
        states = plain(*args, **kwargs)
        states = replace(states, exits=Exits(states.exits))
        made.append(weakref.ref(states.exits))
        alive.append(sum(each() is not None for each in made))
        return states

    gpt.forward_states, found = forward_states, {}
    for window in windows:
        tuning_step.WINDOW = window
        gpt.zero_grad()
        made, alive, sums, order = [], [], [], []

        def consume(batch, states, final, order=order, sums=sums):
            order.append(next(i for i, each in enumerate(batches) if each is batch))
            result = tuning_step.exit_step(gpt, batch, states, final, teacher, gpt.early_exit, 0.3)
            sums.append({n: stats.clone() for n, stats in result.stats.items()})

        tuning_step.run_backbone(gpt, iter(batches), BATCHES, True, consume)
        assert order == list(range(BATCHES))
        gradients = {name: p.grad.clone() for name, p in gpt.exits.named_parameters() if p.grad is not None}
        found[window] = gradients, sums, max(alive)
    return found


@pytest.mark.parametrize("stages", [2, 3])
def test_windows_change_memory_alone(stages, workers):
    for found in workers(stages).run(step, stages, [100, 1, 2]):
        gradients, sums, most = found[100]
        assert most == BATCHES, "without windows all wait"
        for window in (1, 2):
            mine, theirs, alive = found[window]
            assert alive <= window * stages
            assert mine.keys() == gradients.keys() and all(mine[n].equal(gradients[n]) for n in mine)
            for one, other in zip(theirs, sums, strict=True):
                assert one.keys() == other.keys() and all(one[n].equal(other[n]) for n in one)
        assert gradients and all(gradient.any() for gradient in gradients.values())
