# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Exit losses that are attached to a hidden state, in mixed precision."""

import pytest
import torch
import torch.nn.functional as F

from nemo_ee.config import ExitObjective, HeadConfig
from nemo_ee.training.exit_loss import Statistic
from tests.support.tiny_gpt import tiny_model, tiny_model_config

LAYER, TOKENS, BATCH = 2, 40, 2


class Head(torch.nn.Module):
    """An exit whose state is the hidden state itself."""

    def __init__(self, config, vocabulary: int):
        from nemo_ee.modeling.projection import ExitProjection

        super().__init__()
        self.config, self.layer = config, LAYER
        self.projection = ExitProjection(config, HeadConfig(projection="tied"), vocabulary, vocabulary)

    def forward(self, hidden, *_):
        return hidden


@pytest.fixture(scope="module")
def transformer_config():
    """Of a model in this process, which brings up Megatron's groups of one rank."""
    return tiny_model(tiny_model_config()).gpt.config


def test_validation_sums_are_wide_under_autocast(transformer_config):
    """The state has the compute dtype, as when training; all from there on is float32."""
    from nemo_ee.modeling.heads import ExitSurroundings
    from nemo_ee.training.deferred_loss import ExitTargets

    torch.manual_seed(0)
    vocabulary, width = 128, transformer_config.hidden_size
    hidden, weight = torch.randn(TOKENS, BATCH, width), torch.randn(vocabulary, width)
    labels = torch.randint(0, vocabulary, (BATCH, TOKENS))
    mask = torch.ones(BATCH, TOKENS)
    seen = []
    objective = ExitObjective()
    targets = ExitTargets(labels, mask, {LAYER: 1.0}, objective, lambda: 1.0, seen.append)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        head = Head(transformer_config, vocabulary)
        assert targets.attach(head, hidden, weight, ExitSurroundings()) is hidden
    logits = hidden.bfloat16().double().transpose(0, 1) @ weight.double().T
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (result,) = seen
    assert result.stats[LAYER].dtype == torch.float32
    torch.testing.assert_close(result.stats[LAYER][Statistic.LOSS].double(), expected, rtol=1e-6, atol=0)
    confidence = logits.softmax(-1).amax(-1).sum()
    torch.testing.assert_close(
        result.stats[LAYER][Statistic.CONFIDENCE].double(), confidence, rtol=1e-6, atol=0
    )
