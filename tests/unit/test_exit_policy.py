# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""When exits are asked and draft: with made-up prices, on played texts."""

import itertools
import random

import pytest

from nemo_ee.decoding.leaving import NEVER
from nemo_ee.decoding.pass_prices import PassPrices
from nemo_ee.decoding.policy.exit_policy import CREDIT, LOSS, SAVED, ExitPolicy, Round
from nemo_ee.decoding.policy.forecast import round_rate, step_price

TOKENS = (1, 2, 4, 5, 8, 16, 32)
GROWTH = {
    "bytes": (1.0, 1.01, 1.02, 1.02, 1.03, 1.05, 1.1),  # further tokens are free, as on a GPU
    "cpu": (1.0, 1.02, 1.16, 1.47, 1.53, 2.47, 4.7),
    "arithmetic": (1.0, 2.0, 4.0, 5.0, 8.0, 16.0, 32.0),  # a token costs the same whatever it runs with
}
LAYERS = 12


def made_up(growth="cpu", head=0.06, output=0.2, start=0.01, exits=(4, 8), greedy=None):
    """A token at full depth costs 1: `output` of it in the output layer; a head and a start are in that unit, too."""
    rows = GROWTH[growth]
    layer = (1 - output - start) / LAYERS
    price = lambda each: tuple(each * g for g in rows)  # noqa: E731
    return PassPrices(
        num_layers=LAYERS,
        tokens=TOKENS,
        start=(start,) * len(TOKENS),
        layer=price(layer),
        output_layer=price(output),
        greedy_output=price(output if greedy is None else greedy),
        exits=exits,
        heads=(price(head),) * len(exits),
    )


def play(policy, left, tokens, sequences=1, seed=0, thresholds=(0.5, 0.5), ask=None):
    """Decodes a text whose tokens leave by chance; returns its price over full depth's, caught up at last, and what was
    asked in each step.

    Args:
        left: chance of a token to have left by each exit; or a function of the step and the sequence.
        ask: exits to ask in place of the policy's.
    """
    rng, prices, layers = random.Random(seed), policy.prices, policy.layers
    pending = [[0] * sequences for _ in layers]  # behind each exit
    total, asked = 0.0, []
    rows = [list(thresholds)] * sequences

    def deep(k, going):
        """A pass behind exit k, -1 for the embedding, up to the next exit; takes along what waits."""
        nonlocal spent
        low = 0 if k < 0 else layers[k]
        high = layers[k + 1] if k + 1 < len(layers) else LAYERS
        count = len(going) if k < 0 else sum(pending[k][s] for s in going)
        spent += prices.segment(low, high, count) - (
            prices.segment(0, 0, count) if low and not stops(k) else 0
        )
        for s in going:
            moved = 1 if k < 0 else pending[k][s]
            if k >= 0:
                pending[k][s] = 0
            if k + 1 < len(layers):
                pending[k + 1][s] += moved

    def stops(k):
        return k in plan or waited[k]

    for step in range(tokens):
        waited = [any(each) for each in pending]
        plan = range(policy.ask(rows, 0)) if ask is None else ask
        asked.append(plan)
        spent, going, layer_of = 0.0, list(range(sequences)), [LAYERS] * sequences
        luck = [rng.random() for _ in going]
        deep(-1, going)
        for k, layer in enumerate(layers):
            if k in plan and going:
                spent += prices.head(layer, len(going))
                for s in list(going):
                    chance = left(step, s) if callable(left) else left
                    if luck[s] < chance[k]:
                        layer_of[s] = layer
                        going.remove(s)
            if going:
                deep(k, going)
        if going:
            spent += prices.output(len(going))
        for s in range(sequences):
            policy.observe([t if k in plan else NEVER for k, t in enumerate(thresholds)], layer_of[s])
        edges = [*layers, LAYERS]
        owed = sum(sum(each) * (LAYERS - edges[k]) for k, each in enumerate(pending))
        policy.settle(sequences, spent, sequences, owed)
        total += spent
    spent = 0.0
    for k in range(len(layers)):  # what still waits
        if any(pending[k]):
            deep(k, [s for s in range(sequences) if pending[k][s]])
    return (total + spent) / tokens / prices.full_depth(sequences), asked


ALWAYS = (0, 1)


def share_asked(asked, exit_index=None):
    tail = asked[len(asked) // 4 :]
    return sum(bool(plan) if exit_index is None else exit_index in plan for plan in tail) / len(tail)


def test_exits_that_pay_are_asked_and_cost_what_asking_always_does():
    for left in ((0.4, 0.6), (0.3, 0.5)):
        policy = ExitPolicy(made_up(), (4, 8))
        price, asked = play(policy, left, 500)
        always, _ = play(ExitPolicy(made_up(), (4, 8)), left, 500, ask=ALWAYS)
        assert share_asked(asked) > 0.95
        assert price < 0.9 and price <= always * 1.02, (price, always)


def test_an_exit_that_does_not_pay_behind_one_that_does_is_left_out():
    price, asked = play(ExitPolicy(made_up(), (4, 8)), (0.4, 0.41), 600)
    assert share_asked(asked, 0) > 0.9 and share_asked(asked, 1) < 0.4
    always, _ = play(ExitPolicy(made_up(), (4, 8)), (0.4, 0.41), 600, ask=ALWAYS)
    assert price < always - 0.01


def test_no_exit_is_asked_behind_one_that_is_left_out():
    """Else a token could leave there with another answer than an exit before has, which agrees with full depth."""
    _, asked = play(ExitPolicy(made_up(head=0.1), (4, 8)), (0.02, 0.5), 600)
    assert set(map(len, asked)) <= {0, 1, 2} and all(list(plan) == list(range(len(plan))) for plan in asked)


@pytest.mark.parametrize("sequences", [1, 4, 16])
def test_exits_that_never_let_a_token_leave_are_hardly_asked(sequences):
    price, asked = play(ExitPolicy(made_up(), (4, 8)), (0.0, 0.0), 600, sequences)
    assert share_asked(asked) < 0.15 and price <= 1 + LOSS / sequences * (1 + CREDIT / 600) + 1e-9


def test_in_batches_what_pays_alone_does_not():
    """The same exits, by the same prices: some token of sixteen always goes on, so that nothing is saved."""
    left, prices = (0.4, 0.6), made_up(head=0.06, output=0.06)
    for sequences, expected in ((1, True), (16, False)):
        price, asked = play(ExitPolicy(prices, (4, 8)), left, 300, sequences)
        always, _ = play(ExitPolicy(prices, (4, 8)), left, 300, sequences, ask=ALWAYS)
        assert (always < 1) is expected
        assert (share_asked(asked) > 0.9) is expected and price <= min(1.01, always * 1.02)


def test_prices_of_another_machine_decide_otherwise():
    """The same exits where heads are dear, and in a batch where a pass of few tokens saves much."""
    left = (0.15, 0.3)
    cheap, dear = (play(ExitPolicy(made_up(head=h), (4, 8)), left, 400)[1] for h in (0.01, 0.5))
    assert share_asked(cheap) > 0.9 and share_asked(dear) < 0.1
    left = (0.9, 0.95)
    several = [play(ExitPolicy(made_up(kind), (4, 8)), left, 600, 2) for kind in ("bytes", "arithmetic")]
    assert share_asked(several[0][1]) > 0.9 and several[0][0] < 0.8


def test_neighbours_that_go_through_all_layers_make_asking_useless():
    policy = ExitPolicy(made_up("bytes"), (4, 8))
    for _ in range(50):
        policy.observe([0.5, 0.5], 4)
    assert policy.ask([[0.5, 0.5]], 0) and not policy.ask([[0.5, 0.5]], 3)


def test_exits_without_a_threshold_are_not_asked():
    policy = ExitPolicy(made_up(), (4, 8))
    for _ in range(50):
        policy.observe([0.5, 0.5], 4)
    assert policy.ask([[NEVER, 0.5]], 0) == 2 and policy.ask([[NEVER, NEVER]], 0) == 0


def test_thresholds_are_learned_apart():
    policy = ExitPolicy(made_up(exits=(4,)), (4,))
    for _ in range(100):
        policy.observe([0.2], 4)
        policy.observe([0.99], LAYERS)
    assert policy.ask([[0.2]], 0) == 1 and policy.ask([[0.99]], 0) == 0


def test_it_comes_back_to_exits_that_let_tokens_leave_again():
    price, asked = play(
        ExitPolicy(made_up(), (4, 8)), lambda step, _: (0.0, 0.0) if step < 400 else (0.7, 0.8), 2500
    )
    before = asked[100:400]
    assert sum(map(bool, before)) < 0.15 * len(before) and all(asked[-50:]) and price < 0.9


@pytest.mark.parametrize("kind", GROWTH)
@pytest.mark.parametrize("sequences", [1, 2, 5])
def test_whatever_exits_do_asking_loses_no_more_than_stated(kind, sequences):
    """Tokens that never leave, leave one by one, change their mind, or leave when that costs most."""
    texts = {
        "never": (0.0, 0.0),
        "often": (0.5, 0.5),
        "one of them": lambda _, s: (1.0, 1.0) if s == 0 else (0.0, 0.0),
        "in turn": lambda step, s: (1.0, 1.0) if step % sequences == s else (0.0, 0.0),
        "then never": lambda step, _: (1.0, 1.0) if step < 200 else (0.0, 0.0),
        "every other": lambda step, _: (step % 2,) * 2,
    }
    for (name, left), tokens in itertools.product(texts.items(), (16, 64, 300)):
        price, _ = play(ExitPolicy(made_up(kind), (4, 8)), left, tokens, sequences)
        at_last = 1 / tokens  # a pass for what waits at the end, which a text that ends does not run
        assert price <= 1 + LOSS / sequences * (1 + CREDIT / tokens) + at_last, (name, tokens, price)


def play_rounds(policy, sure, right, tokens, seed=0, sequences=1, thresholds=(0.5, 0.5)):
    """Decodes a lossless text whose exits are sure and right at random; its price per that of full depth, and rounds.

    Args:
        sure: chance of each exit to be sure; or a function of the number of tokens so far.
        right: chance of a sure exit to be right, likewise.
    """
    rng, prices = random.Random(seed), policy.prices
    full = prices.full_depth(sequences)
    made = spent = 0.0
    rounds = []
    while made < tokens:
        chance_sure = sure(made) if callable(sure) else sure
        chance_right = right(made) if callable(right) else right
        chosen = policy.draft([list(thresholds)] * sequences)
        rounds.append(chosen)
        if chosen is None:
            policy.settle(sequences, full, sequences, 0)
            made, spent = made + 1, spent + full
            continue
        k, layer, price = chosen.exit_index, policy.layers[chosen.exit_index], 0.0
        share = {kind: policy.share(kind, k, thresholds[k]) for kind in ("sure", "right")}
        drafts, waiting = [0] * sequences, [False] * sequences
        while not all(waiting):
            going = [i for i in range(sequences) if not waiting[i]]
            asked = [i for i in going if drafts[i] < chosen.length]
            price += prices.segment(0, layer, len(going)) + (prices.head(layer, len(asked)) if asked else 0)
            for i in going:
                is_sure = i in asked and rng.random() < chance_sure[k]
                if i in asked:
                    share["sure"].observe(is_sure, 1)
                drafts[i], waiting[i] = drafts[i] + is_sure, not is_sure
        fed = sum(drafts) + sequences
        price += prices.segment(layer, LAYERS, fed) + prices.output(fed)
        gave = 0
        for count in drafts:
            good = 0
            while good < count and rng.random() < chance_right[k]:
                good += 1
            share["right"].observe(good, good + (good < count))
            gave += good + 1
        policy.settle(gave, price, sequences, 0)
        made, spent = made + gave / sequences, spent + price
    return spent / made / full, rounds


@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("kind", GROWTH)
def test_whatever_drafts_do_the_loss_is_bounded(kind, sequences):
    """Exits that are never right, never sure, change their mind, or are wrong just when they are trusted."""
    texts = {
        "never right": ((1, 1), (0, 0)),
        "never sure": ((0, 0), (1, 1)),
        "at random": ((0.5, 0.5), (0.5, 0.5)),
        "right, then wrong": ((1, 1), lambda made: (made < 200,) * 2),
        "one of ten": ((1, 1), lambda made: (made % 10 < 1,) * 2),
    }
    for (name, (sure, right)), tokens in itertools.product(texts.items(), (8, 64, 300)):
        price, _ = play_rounds(
            ExitPolicy(made_up(kind, head=0.03), (4, 8)), sure, right, tokens, sequences=sequences
        )
        assert price <= 1 + LOSS / sequences * (1 + CREDIT / tokens) + 1e-9, (name, tokens)


@pytest.mark.parametrize("before", ["right", "never sure"])
def test_a_bad_text_loses_little_after_many_good_ones(before):
    """A server's policy lives as long as the server."""
    policy = ExitPolicy(made_up(head=0.03, exits=(4,)), (4,))
    own = dict(thresholds=(0.5,))
    price, _ = play_rounds(policy, (0.95 if before == "right" else 0.0,), (0.98,), 3000, **own)
    assert price < 0.9 or before == "never sure"
    for seed in range(3):
        price, _ = play_rounds(policy, (0.95,), (0.0,), 500, seed, **own)
        assert price <= 1 + LOSS * (1 + (SAVED + CREDIT) / 500) + 1e-9
    price, _ = play_rounds(policy, (0.95,), (0.98,), 2000, **own)
    assert price < 0.95, "and comes back"


def test_it_drafts_where_that_pays_and_from_the_exit_that_is_better():
    price, rounds = play_rounds(
        ExitPolicy(made_up("bytes", head=0.03), (4, 8)), (0.9, 0.95), (0.95, 0.97), 400
    )
    assert price < 0.75
    assert all(each is not None and each.exit_index == 0 for each in rounds[-50:])
    price, rounds = play_rounds(
        ExitPolicy(made_up("bytes", head=0.03), (4, 8)), (0.1, 0.95), (0.5, 0.97), 400
    )
    assert price < 0.95
    assert sum(each == Round(1, each.length) for each in rounds[-50:] if each) > 40


def test_it_stops_where_drafts_are_wrong_and_comes_back_where_they_are_right_again():
    def right(made):
        return (0.0, 0.0) if made < 300 else (1.0, 1.0)

    _, rounds = play_rounds(ExitPolicy(made_up("bytes", head=0.03), (4, 8)), (0.9, 0.9), right, 3000)
    early = rounds[100:250]
    assert sum(each is not None for each in early) < 0.1 * len(early)
    assert all(each is not None for each in rounds[-20:])


def test_a_gain_within_the_error_of_prices_is_not_worth_a_round():
    shares = []
    for sure in (0.03, 0.2):
        policy = ExitPolicy(made_up("bytes", head=0.03, exits=(4,)), (4,))
        _, rounds = play_rounds(policy, (sure,), (0.95,), 2000, thresholds=(0.5,))
        shares.append(sum(each is not None for each in rounds[200:]) / len(rounds[200:]))
    assert shares[0] < 0.4 and shares[1] > 0.9, shares


def test_greedy_drafts_are_learned_over_sessions_and_sampled_ones_anew():
    known, bad = {}, (made_up(head=0.03, exits=(4,)), (4,))
    rows = [[0.5]]
    for greedy in (False, True):
        policy = ExitPolicy(*bad, known)
        policy.greedy = greedy
        assert policy.draft(rows), "hope"
        policy.share("right", 0, 0.5).observe(0, 50)
        assert policy.draft(rows) is None
        assert bool(known) == greedy
    later = ExitPolicy(*bad, known)
    assert later.draft(rows), "sampled: hope again"
    later.greedy = True
    assert later.draft(rows) is None
    assert later.draft([[0.6]]), "another threshold"


def test_a_session_that_does_not_draft_forgets_nothing_of_other_thresholds():
    policy = ExitPolicy(made_up(head=0.03, exits=(4,)), (4,), known := {})
    policy.greedy = True
    policy.share("right", 0, 0.5).observe(0, 50)
    policy.share("right", 0, 0.6).observe(0, 50)
    before = {key: share.mean for key, share in known.items()}
    assert policy.draft([[0.5]]) is None
    assert known["right", 4, 0.5].mean > before["right", 4, 0.5]
    assert known["right", 4, 0.6].mean == before["right", 4, 0.6]


def test_drafts_grow_longer_where_they_are_right():
    lengths = []
    for chance in (0.85, 0.99):
        _, rounds = play_rounds(ExitPolicy(made_up("bytes", head=0.03), (4, 8)), (0.95, 0), (chance, 0), 600)
        lengths.append([each.length for each in rounds if each is not None][-1])
    assert lengths[0] < lengths[1]


def test_only_exits_with_a_threshold_draft_and_for_those_that_have_one():
    policy = ExitPolicy(made_up(head=0.03), (4, 8))
    _, rounds = play_rounds(policy, (1, 1), (1, 1), 100, thresholds=(NEVER, 0.5))
    assert {each.exit_index for each in rounds if each is not None} == {1}
    assert ExitPolicy(made_up(head=0.03), (4, 8)).draft([[NEVER, NEVER]]) is None


def test_expected_rate_is_the_average():
    """Against played rounds, where the expectations are true."""
    prices = made_up("bytes", head=0.03)
    for n in (1, 3):

        class Fixed(ExitPolicy):
            def draft(self, rows, n=n):
                return Round(0, n)

        price, _ = play_rounds(Fixed(prices, (4, 8)), (0.5, 0), (0.8, 0), 8000)
        rate = round_rate(prices, 4, n, 1, 0.5, 0.8)
        assert 1 / (price * prices.full_depth(1)) == pytest.approx(rate, rel=0.03)


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("kind", ["bytes", "cpu"])
def test_expected_price_is_the_average(kind, sequences):
    """Against played texts, where the expectations are true; several sequences' passes vary in how many tokens they
    take, of which the price at the mean knows nothing."""
    left = {0: 0.4, 1: 0.7}
    for plan in ((0,), (1,), (0, 1)):
        policy = ExitPolicy(made_up(kind), (4, 8))
        price, _ = play(policy, (0.4, 0.7), 3000, sequences, ask=plan)
        layers, shares = [policy.layers[k] for k in plan], [left[k] for k in plan]
        expected = step_price(policy.prices, layers, shares, sequences, 0) / policy.prices.full_depth(
            sequences
        )
        assert price == pytest.approx(expected, rel=0.04), plan


def test_tokens_that_are_searched_for_are_priced_so():
    """Decisions are those of a model whose output layer costs as much as the search."""
    for greedy in (True, False):
        policy = ExitPolicy(made_up(output=0.4, greedy=0.02), (4, 8))
        policy.greedy = greedy
        plain = ExitPolicy(policy.prices.greedy if greedy else made_up(output=0.4), (4, 8))
        assert plain.prices.full_depth(1) == pytest.approx(0.62 if greedy else 1.0)
        for sequences in (1, 4):
            rows, others = [[0.5, 0.5]] * sequences, 1
            assert policy._best_plan(rows, others) == plain._best_plan(rows, others)
            assert policy.draft(rows) == plain.draft(rows)
            for each in (policy, plain):
                each.settle(sequences, 0.7, sequences, 5)
            assert policy._saved == plain._saved
