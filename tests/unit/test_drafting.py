# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Drafting: the choice of rounds, and the costs that it rests on."""

import itertools
import random

import pytest
import torch

from nemo_ee.decoding.drafts.drafting import (
    CREDIT,
    LOSS,
    SAVED,
    DraftingPolicy,
    Outcome,
    Round,
    expected_rate,
)
from nemo_ee.decoding.drafts.pass_costs import DRAFT_HEAD, GROWTH, PassCosts, pass_costs

COSTS = PassCosts(to_exit=(1.0, 2.0), head=(0.2, 0.2), full=4.0, growth=GROWTH["gpu"])


def play(policy, sure, right, tokens, seed=0, sequences=1, exits=(0, 1)):
    """Decodes a text whose exits are sure and right at random; returns its cost per that of full depth, and rounds.

    Args:
        sure: chance of each exit to be sure; or a function of the number of tokens so far.
        right: chance of a sure exit to be right, likewise.
    """
    rng, costs = random.Random(seed), policy.costs
    made = spent = 0.0
    rounds = []
    while made < tokens:
        chance_sure = sure(made) if callable(sure) else sure
        chance_right = right(made) if callable(right) else right
        chosen = policy.next(sequences, exits)
        rounds.append(chosen)
        if chosen is None:
            policy.observe_full_depth(sequences)
            made, spent = made + 1, spent + costs.full_depth(sequences)
            continue
        k, outcome = chosen.exit_index, Outcome()
        drafts, waiting = [0] * sequences, [False] * sequences
        while not all(waiting):
            going = [i for i in range(sequences) if not waiting[i]]
            asked = [i for i in going if drafts[i] < chosen.length]
            outcome.cost += costs.shallow(k, len(going)) + (costs.asked(k, len(asked)) if asked else 0)
            outcome.asked += len(asked)
            for i in going:
                if i in asked and rng.random() < chance_sure[k]:
                    drafts[i] += 1
                else:
                    waiting[i] = True
        outcome.cost += costs.verify(k, sum(drafts) + sequences)
        for count in drafts:
            good = 0
            while good < count and rng.random() < chance_right[k]:
                good += 1
            outcome.accepted += good
            outcome.rejected += good < count
            outcome.tokens += good + 1
        outcome.drafts = sum(drafts)
        policy.observe(chosen, outcome, sequences)
        made, spent = made + outcome.tokens / sequences, spent + outcome.cost
    return spent / made * sequences / costs.full_depth(sequences) / sequences, rounds


@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("kind", ["native", "bf16", "int8", "gpu"])
def test_whatever_exits_do_the_loss_is_bounded(kind, sequences):
    """Exits that are never right, never sure, change their mind, or are wrong just when they are trusted."""
    costs = PassCosts(to_exit=(1.0, 2.0), head=(0.2, 0.1), full=4.0, growth=GROWTH[kind])
    texts = {
        "never right": ((1, 1), (0, 0)),
        "never sure": ((0, 0), (1, 1)),
        "at random": ((0.5, 0.5), (0.5, 0.5)),
        "right, then wrong": ((1, 1), lambda made: (made < 200,) * 2),
        "one of ten": ((1, 1), lambda made: (made % 10 < 1,) * 2),
    }
    for (name, (sure, right)), tokens in itertools.product(texts.items(), (8, 24, 64, 500)):
        cost, _ = play(DraftingPolicy(costs), sure, right, tokens, sequences=sequences)
        assert cost <= 1 + LOSS * (1 + CREDIT / tokens) + 1e-9, (name, tokens)


@pytest.mark.parametrize("before", ["right", "never sure"])
def test_a_bad_text_loses_little_after_many_good_ones(before):
    """A server's policy lives as long as the server."""
    costs = PassCosts(to_exit=(1.0,), head=(0.1,), full=4.0, growth=GROWTH["native"])
    policy = DraftingPolicy(costs)
    sure = 0.95 if before == "right" else 0.0
    cost, _ = play(policy, (sure,), (0.98,), 20_000, exits=(0,))
    assert cost < 0.9 or before == "never sure"
    for seed in range(3):
        cost, _ = play(policy, (0.95,), (0.0,), 500, seed, exits=(0,))
        assert cost <= 1 + LOSS * (1 + (SAVED + CREDIT) / 500) + 1e-9
    cost, _ = play(policy, (0.95,), (0.98,), 2000, exits=(0,))
    assert cost < 0.95, "and comes back"


def test_it_drafts_where_that_pays_and_from_the_exit_that_is_better():
    cost, rounds = play(DraftingPolicy(COSTS), (0.9, 0.95), (0.95, 0.97), 400)
    assert cost < 0.75
    assert all(each is not None and each.exit_index == 0 for each in rounds[-50:])
    cost, rounds = play(DraftingPolicy(COSTS), (0.1, 0.95), (0.5, 0.97), 400)
    assert cost < 0.85
    assert sum(each == Round(1, each.length) for each in rounds[-50:] if each) > 40


def test_it_stops_where_drafts_are_wrong_and_comes_back_where_they_are_right_again():
    def right(made):
        return (0.0, 0.0) if made < 300 else (1.0, 1.0)

    _, rounds = play(DraftingPolicy(COSTS), (0.9, 0.9), right, 3000)
    early = rounds[100:250]
    assert sum(each is not None for each in early) < 0.1 * len(early)
    assert all(each is not None for each in rounds[-20:])


def test_a_gain_within_the_error_of_costs_is_not_worth_a_round():
    costs = PassCosts(to_exit=(1.0,), head=(0.1,), full=4.0, growth=((1, 1.0), (64, 1.2)))
    shares = []
    for sure in (0.03, 0.12):  # rounds of one draft would lose 0.4 %, and gain 6 %
        _, rounds = play(DraftingPolicy(costs), (sure,), (0.95,), 2000, exits=(0,))
        shares.append(sum(each is not None for each in rounds[200:]) / len(rounds[200:]))
    assert shares[0] < 0.4 and shares[1] > 0.9, shares


def test_drafts_grow_longer_where_they_are_right():
    lengths = [
        play(DraftingPolicy(COSTS), (0.95, 0), (chance, 0), 600)[1][-1].length for chance in (0.8, 0.99)
    ]
    assert lengths[0] < lengths[1]


def test_an_exit_that_may_not_draft_does_not():
    _, rounds = play(DraftingPolicy(COSTS), (1, 1), (1, 1), 100, exits=(1,))
    assert {each.exit_index for each in rounds if each is not None} == {1}
    assert DraftingPolicy(COSTS).next(1, ()) is None


def test_expected_rate_is_the_average():
    """Against played rounds, where the expectations are true."""
    policy = DraftingPolicy(COSTS)
    chances = (policy.sure[0].mean, policy.right[0].mean)
    for n in (1, 3):

        class Fixed(DraftingPolicy):
            def next(self, sequences, exits, n=n):
                return Round(0, n)

        cost, _ = play(Fixed(COSTS), (chances[0],), (chances[1],), 60_000)
        assert 1 / (cost * COSTS.full) == pytest.approx(expected_rate(COSTS, 0, n, 1, *chances), rel=0.02)


def test_growth_interpolates():
    growth = PassCosts((), (), 1.0, ((1, 1.0), (3, 2.0), (4, 4.0))).grown
    assert [growth(n) for n in (0.5, 1, 2, 3, 3.5, 4, 6)] == [1.0, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0]


def test_costs_are_bytes_of_weights():
    from nemo_ee.decoding.decoding_model import DecodingModel
    from tests.support.tiny_gpt import HEADS, tiny_model, tiny_model_config

    config = tiny_model_config(
        head=HEADS["MLP, untied"], exits=[1, 3], share_embeddings_and_output_weights=False
    )
    gpt = tiny_model(config).gpt
    with torch.inference_mode():
        costs = pass_costs(DecodingModel(gpt, eight_bit_heads=True), [1, 3])

    def matrices(module):
        return sum(p.nbytes for p in module.parameters() if p.dim() == 2)

    layers = [matrices(layer) for layer in gpt.decoder.layers]
    assert costs.to_exit == (layers[0], sum(layers[:3]))
    assert costs.full == sum(layers) + gpt.output_weight().nbytes
    eight_bits = [DRAFT_HEAD * matrices(gpt.exits[str(n)]) for n in (1, 3)]
    assert costs.head == pytest.approx(eight_bits)
