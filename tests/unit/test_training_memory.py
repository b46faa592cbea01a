# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Statistics of exits and of the final exit need one chunk of logits beyond what a step needs anyway.

Measured as scripts/benchmarks/training_overhead.py does: from the events of torch's allocator.
"""

from functools import partial

import pytest
import torch

from tests.support.memory_peak import memory_peak
from tests.support.tiny_gpt import tiny_model, tiny_model_config

SEQUENCE, BATCH, VOCABULARY, CHUNK = 256, 4, 16384, 128
MIB = 2**20
CHUNK_MIB = 4 * CHUNK * VOCABULARY / MIB
HEADS = {
    "tied": dict(mlp=False, linear=False, projection="tied"),
    "untied": dict(mlp=False, linear=True, projection="untied", train_projection=True),
}


class _Step:
    """One micro-batch of a model with exits behind layers 2 and 4, as the pre-training model runs it."""

    def __init__(self, head: str, dtype: torch.dtype):
        from nemo_ee.models.training_metrics import TrainingMetrics

        config = tiny_model_config(
            exits=[2, 4],
            head=HEADS[head],
            early_exit__training__loss_chunk_tokens=CHUNK,
            encoder_seq_length=SEQUENCE,
            max_position_embeddings=SEQUENCE,
            override_vocab_size=VOCABULARY,
        )
        self.gpt = tiny_model(config).gpt.to(dtype)
        self.gpt.true_vocab_size = VOCABULARY
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(6, VOCABULARY, (BATCH, SEQUENCE), generator=generator)
        self.mask = (torch.rand(BATCH, SEQUENCE, generator=generator) > 0.3).float()
        self.metrics = TrainingMetrics((2, 4), self.gpt)
        for parameter in self.gpt.parameters():
            parameter.requires_grad_(True)
            parameter.grad = torch.zeros_like(parameter)

    def run(self, observe: bool, gradients: bool) -> None:
        from nemo_ee.config import ExitObjective
        from nemo_ee.training.deferred_loss import ExitTargets

        self.metrics.start(torch.device("cpu"), observe)
        targets = ExitTargets(
            self.tokens,
            self.mask,
            {2: 0.5, 4: 0.7},
            ExitObjective(loss_chunk_tokens=CHUNK),
            lambda: 1.0,
            partial(self.metrics.add_exit, 0, self.mask),
        )
        positions = torch.arange(SEQUENCE).expand(BATCH, -1)
        with torch.set_grad_enabled(gradients), self.metrics.final_exit(0, self.mask):
            losses = self.gpt(self.tokens, positions, None, labels=self.tokens, exit_targets=targets)
        self.metrics.add_final_loss(losses, self.mask)
        if gradients:
            losses.mean().backward()

    def peak(self, observe: bool, gradients: bool) -> float:
        """MiB."""
        return memory_peak(lambda: self.run(observe, gradients))[0]


@pytest.mark.parametrize(("head", "dtype"), [("tied", torch.float32), ("untied", torch.bfloat16)])
def test_observing_needs_one_chunk_more(head, dtype):
    step = _Step(head, dtype)
    step.gpt.train()
    step.run(True, True)  # whatever is made once
    plain, logged = step.peak(False, True), step.peak(True, True)
    step.gpt.eval()
    validated = step.peak(True, False)
    whole = 4 * SEQUENCE * BATCH * VOCABULARY / MIB
    assert plain > whole / 2, "the step's own peak is that of the final exit's logits"
    assert logged < 1.05 * plain + CHUNK_MIB, (plain, logged)
    assert validated < 1.05 * plain + CHUNK_MIB, (plain, validated)


def test_the_final_exit_is_seen_as_it_is():
    step = _Step("tied", torch.float32)
    step.gpt.eval()
    step.run(True, False)
    found = step.metrics.finish(1)
    with torch.no_grad():
        logits = step.gpt(step.tokens, torch.arange(SEQUENCE).expand(BATCH, -1), None)
        log = torch.log_softmax(logits.double(), -1)
    sure, best = log.max(-1)
    mean = lambda values: ((values * step.mask).sum() / step.mask.sum()).item()  # noqa: E731
    labels = torch.gather(-log, -1, step.tokens[..., None])[..., 0]
    assert found[0].confidence == pytest.approx(mean(sure.exp()), rel=1e-5)
    assert found[0].loss == pytest.approx(mean(labels), rel=1e-5)
    assert found[0].agreement == 1.0
    with torch.no_grad(), step.gpt.capture() as states:
        step.gpt(step.tokens, torch.arange(SEQUENCE).expand(BATCH, -1), None)
        head = step.gpt.exits["4"]
        exit_best = (head(states[4]) @ step.gpt.output_weight().T).argmax(-1).t()
    assert found[4].agreement == pytest.approx(mean((exit_best == best).float()), abs=0.01)
