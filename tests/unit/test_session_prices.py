# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What sessions ask by prices, and what their passes cost."""

import pytest
import torch

from tests.support.tiny_gpt import HEADS, tiny_model, tiny_model_config
from tests.unit.test_session import LAYERS, PROMPTS, STEPS, run, sequence


@pytest.fixture(scope="module")
def gpt():
    head = HEADS["block, MLP, linear, untied"]
    config = tiny_model_config(head=head, exits=LAYERS, share_embeddings_and_output_weights=False)
    return tiny_model(config, dtype=torch.float64).gpt


def priced(growth=0.02, head=0.06):
    """Made-up prices in which a head costs so much of a token at full depth."""
    from nemo_ee.decoding.pass_prices import PassPrices

    counts = (1, 2, 4, 8, 16)

    def row(price):
        return tuple(price * (1 + growth * (n - 1)) for n in counts)

    each = row(head)
    return PassPrices(8, counts, (0.0,) * 5, row(0.1), row(0.2), row(0.2), tuple(LAYERS), (each,) * 3)


def test_a_session_asks_where_prices_say_that_it_pays(gpt):
    """The same model and requests; and text that asks always, whatever the prices."""
    from nemo_ee.decoding.policy.exit_policy import ExitPolicy

    exits = {1: 0.0, 3: 0.0}
    left = {}
    for name, head, batch, always in (
        ("cheap", 0.02, 1, False),
        ("dear", 3.0, 1, False),
        ("dear, always", 3.0, 2, True),
    ):
        sequences = [sequence(p, exits, always=always) for p in PROMPTS[:batch]]
        run(gpt, sequences, policy=ExitPolicy(priced(head=head), LAYERS))
        left[name] = sum(layer < 8 for s in sequences for layer in s.exit_layers) / (STEPS - 1) / batch
    assert left["cheap"] > 0.9 and left["dear"] == 0 and left["dear, always"] == 1


def test_what_a_session_spends_is_what_its_passes_cost(gpt):
    """By prices that count tokens through layers, so that catching up costs what running costs."""
    from nemo_ee.decoding.policy.exit_policy import ExitPolicy

    policy = ExitPolicy(priced(growth=1.0, head=0.0), LAYERS)
    sequences = [sequence(p, {1: 0.02, 4: 0.3}) for p in PROMPTS[:3]]
    session = run(gpt, sequences, policy=policy)
    layers = sum(s.statistics.layers_run - 8 * len(s.prompt) for s in sequences)
    final = sum(layer == 8 for s in sequences for layer in s.exit_layers[1:])
    assert session._decoder.spent == pytest.approx(0.1 * layers + 0.2 * final)
