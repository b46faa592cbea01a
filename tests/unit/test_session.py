# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Sessions: sequences of different requests that decode together, and lossless decoding."""

import functools
import math
import random

import pytest
import torch

from nemo_ee.decoding.generated_sequence import Draft
from nemo_ee.decoding.policy.exit_policy import Round
from tests.support.drafting import EagerDrafts
from tests.support.tiny_gpt import HEADS, tiny_model, tiny_model_config
from tests.support.uncached import generate_uncached

PROMPTS = [[7, 8, 9, 20, 33], [41], [100, 7, 55, 56, 57, 58, 59, 60, 12, 13, 90, 3], [5, 6], [199, 3, 3]]
STEPS = 24
LAYERS = [1, 3, 4]
EOS = 0


@pytest.fixture(scope="module")
def gpt():
    head = HEADS["block, MLP, linear, untied"]
    config = tiny_model_config(head=head, exits=LAYERS, share_embeddings_and_output_weights=False)
    return tiny_model(config, dtype=torch.float64).gpt


def sequence(prompt, exits, lossless=False, limit=STEPS, seed=0, ends=frozenset(), always=None, **sampling):
    """One whose exits are asked for every token, unless told otherwise."""
    from nemo_ee.decoding.generated_sequence import GeneratedSequence
    from nemo_ee.decoding.request import GenerationRequest, SamplingOptions

    options = SamplingOptions(use_greedy=not sampling, **sampling)
    request = GenerationRequest(
        max_length=limit,
        sampling=options,
        exits=exits,
        lossless=lossless,
        always=not lossless if always is None else always,
    )
    return GeneratedSequence(list(prompt), request, ends, EOS, limit, seed)


@functools.cache
def full_text(gpt, prompt, steps=STEPS):
    """The uncached full model's tokens."""
    return generate_uncached(gpt, list(prompt), steps, {}).tokens


def new_session(gpt, slots, layers=LAYERS, **options):
    """Lossless sequences draft whether it pays or not."""
    from nemo_ee.decoding.assumed_prices import prices_of
    from nemo_ee.decoding.decoding_model import DecodingModel
    from nemo_ee.decoding.session import DecodingSession

    model = DecodingModel(gpt)
    policy = EagerDrafts(prices_of(model), layers)
    return DecodingSession(model, layers, slots, 64, **{"policy": policy, **options})


def run(gpt, sequences, slots=None, layers=LAYERS, **options):
    """Decodes all; later ones join as earlier ones leave."""
    waiting, finished = list(sequences), []
    with torch.inference_mode():
        session = new_session(gpt, slots or len(sequences), layers, **options)
        while waiting or session.running:
            batch, waiting = waiting[: session.free], waiting[session.free :]
            finished += session.add(batch) if batch else []
            finished += session.step() if session.running else []
    assert {id(s) for s in finished} == {id(s) for s in sequences}
    assert all(s.finish_reason in ("stop", "length") for s in finished)
    return session


def test_each_sequence_has_its_own_exits_and_thresholds_whoever_decodes_beside_it(gpt):
    """Two slots for five sequences, so that they join and leave at different times."""
    exits = [{1: 0.7, 4: 0.5}, {}, {3: 0.4}, {1: 0.9, 3: 0.6, 4: 0.6}, {4: 0.3}]
    sequences = [
        sequence(prompt, each, limit=STEPS - 3 * i)
        for i, (prompt, each) in enumerate(zip(PROMPTS, exits, strict=True))
    ]
    run(gpt, sequences, slots=2)
    for s, each in zip(sequences, exits, strict=True):
        reference = generate_uncached(gpt, s.prompt, s.limit, each)
        assert (s.tokens, s.exit_layers) == (reference.tokens, reference.exit_layers)
        assert s.confidences == pytest.approx(reference.confidences, rel=1e-9)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("exits", [[1], [3, 4], LAYERS], ids=str)
def test_lossless_greedy_is_the_full_models(gpt, exits, threshold):
    alone, together = (
        [sequence(p, dict.fromkeys(exits, threshold), True) for p in PROMPTS] for _ in range(2)
    )
    for s in alone:
        run(gpt, [s])
    run(gpt, together)
    for one, many in zip(alone, together, strict=True):
        expected = full_text(gpt, tuple(one.prompt))
        assert one.tokens == many.tokens == expected
    drafts = sum(s.statistics.drafts for s in alone)
    accepted = sum(s.statistics.accepted for s in alone)
    assert (drafts > 0) == (threshold < 1.0) and accepted <= drafts


def test_lossless_greedy_where_most_drafts_are_right(gpt):
    """Layers above the first exit that add little, so that drafts come in long rows."""
    head = HEADS["norm, tied"]
    config = tiny_model_config(head=head, exits=[2, 4], share_embeddings_and_output_weights=True)
    agreeable = tiny_model(config, dtype=torch.float64).gpt
    with torch.no_grad():
        for name, parameter in agreeable.decoder.layers[2:].named_parameters():
            if "linear_proj." in name or "linear_fc2." in name:
                parameter *= 0.1
        for n in agreeable.exits:
            agreeable.exits[n].norm.weight.copy_(agreeable.decoder.final_layernorm.weight)
    sequences = [sequence(p, {2: 0.3, 4: 0.1}, True) for p in PROMPTS]
    run(agreeable, sequences, layers=[2, 4])
    for s in sequences:
        assert s.tokens == full_text(agreeable, tuple(s.prompt))
    drafts = sum(s.statistics.drafts for s in sequences)
    accepted = sum(s.statistics.accepted for s in sequences)
    assert 0.4 * STEPS * len(PROMPTS) < accepted < drafts
    assert {2, 4, 8} <= {layer for s in sequences for layer in s.exit_layers}


@pytest.mark.parametrize(
    "trial", [*range(6), *(pytest.param(n, marks=pytest.mark.slow) for n in range(6, 60))]
)
def test_random_prompts_thresholds_and_exits(gpt, trial, monkeypatch):
    """Catch-up, recomputation and lossless decoding, alone and in batches, against uncached forwards; attention
    of ragged packs in one call, in one per run of neighbours, or in one per sequence."""
    rng = random.Random(trial)
    if trial % 3 == 1:
        monkeypatch.setattr(
            "nemo_ee.decoding.layers.packed_tokens.PackedTokens._padding", lambda packed: math.inf
        )
    if trial % 3 == 2:
        monkeypatch.setattr("nemo_ee.decoding.layers.packed_tokens.PADDING", -1)
    batch = rng.randint(2, 6)
    prompts = [[rng.randrange(1, 200) for _ in range(rng.randint(1, 20))] for _ in range(batch)]

    def some_exits():
        return {n: rng.choice([0.0, 0.2, 0.5, 0.8, 1.0]) for n in LAYERS if rng.random() < 0.7}

    exits, steps = [some_exits() for _ in prompts], 16
    early = [sequence(p, e, limit=steps) for p, e in zip(prompts, exits, strict=True)]
    lossless = [sequence(p, e, True, limit=steps) for p, e in zip(prompts, exits, strict=True)]
    recomputed = [sequence(p, e, limit=steps) for p, e in zip(prompts, exits, strict=True)]
    mixed = [*early, *lossless]
    rng.shuffle(mixed)
    run(gpt, mixed, slots=rng.randint(1, len(mixed)))
    run(gpt, recomputed, kv_policy="recompute")
    for i, prompt in enumerate(prompts):
        reference = generate_uncached(gpt, prompt, steps, exits[i])
        for s in (early[i], recomputed[i]):
            assert (s.tokens, s.exit_layers) == (reference.tokens, reference.exit_layers)
        assert lossless[i].tokens == full_text(gpt, tuple(prompt), steps)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8])
def test_lossless_on_a_hundred_prompts(gpt, batch):
    rng = random.Random(7)
    prompts = [[rng.randrange(1, 200) for _ in range(rng.randint(1, 24))] for _ in range(100)]
    expected = [full_text(gpt, tuple(prompt)) for prompt in prompts]
    for threshold in (0.0, 0.25, 0.5, 0.75, 1.0):
        sequences = [sequence(p, dict.fromkeys(LAYERS, threshold), True) for p in prompts]
        run(gpt, sequences, slots=batch)
        assert [s.tokens for s in sequences] == expected


def test_lossless_sequences_beside_others_disturb_nobody(gpt):
    exits = {1: 0.4, 4: 0.4}
    sequences = [sequence(p, exits, lossless=i % 2 == 0) for i, p in enumerate(PROMPTS)]
    run(gpt, sequences, slots=3)
    for s in sequences:
        expected = generate_uncached(gpt, s.prompt, STEPS, {} if s.request.lossless else exits)
        assert s.tokens == expected.tokens


def test_a_stop_among_drafts_ends_a_sequence_there(gpt):
    full = full_text(gpt, tuple(PROMPTS[0]))
    for end in sorted(set(full)):
        s = sequence(PROMPTS[0], {1: 0.0}, True, ends=frozenset({end}))
        run(gpt, [s])
        assert s.tokens == full[: full.index(end) + 1]
        assert s.finish_reason == "stop"


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_a_limit_within_drafts(gpt, limit):
    s = sequence(PROMPTS[0], {1: 0.0, 3: 0.0}, True, limit=limit)
    run(gpt, [s])
    assert s.tokens == full_text(gpt, tuple(PROMPTS[0]), limit)
    assert s.finish_reason == "length"


def test_removing_a_sequence_in_the_middle_of_a_round(gpt):
    sequences = [sequence(p, {1: 0.0}, True) for p in PROMPTS[:3]]
    with torch.inference_mode():
        session = new_session(gpt, 3)
        session.add(sequences)
        session.step()
        session.remove(sequences[0])
        assert sequences[0].finish_reason == "cancelled" and session.free == 1
        while session.running:
            session.step()
    for s in sequences[1:]:
        assert s.tokens == full_text(gpt, tuple(s.prompt))


def test_a_round_does_not_slow_a_lossless_sequence_that_does_not_use_its_exit(gpt):
    drafts, other = sequence(PROMPTS[0], {1: 0.0}, True), sequence(PROMPTS[1], {4: 0.0}, True)
    with torch.inference_mode():
        session = new_session(gpt, 2)
        policy = session._rounds._policy
        policy.draft = lambda rows: Round(0, 4)  # four drafts of the exit on layer 1
        session.add([drafts, other])
        steps = 0
        while other.finish_reason is None:
            session.step()
            steps += 1
            assert len(other.tokens) == 1 + steps, "a token with every pass"
        while session.running:
            session.step()
    for s in (drafts, other):
        assert s.tokens == full_text(gpt, tuple(s.prompt))
    assert drafts.statistics.drafts and not other.statistics.drafts


def test_those_that_come_during_a_round_do_not_prolong_it(gpt):
    """Whoever comes and goes: clients may send and cancel for as long as they like."""
    first = sequence(PROMPTS[0], {1: 0.0}, True)
    with torch.inference_mode():
        session = new_session(gpt, 2)
        session.add([first])
        others, steps = [], 0
        while session.running and steps < 200:
            if others:
                session.remove(others[-1])
            if first in session.running:
                others.append(sequence(PROMPTS[1 + steps % 4], {1: 0.0}, True))
                session.add(others[-1:])
            session.step()
            steps += 1
    assert first.tokens == full_text(gpt, tuple(PROMPTS[0])) and first.statistics.drafts
    assert steps <= 6 * STEPS  # rounds have four drafts at most, and each gives a token


def test_random_numbers_of_discarded_drafts_are_not_used_again():
    behind_a_draft, behind_a_token = (sequence(PROMPTS[0], {}, seed=3, temperature=1.0) for _ in range(2))
    behind_a_draft.drafts.append(Draft(5, 1, 0.9, None))
    behind_a_token.tokens.append(5)
    drawn = [s.random("draw").random() for s in (behind_a_draft, behind_a_token)]
    assert drawn[0] != drawn[1] and drawn[1] == behind_a_token.random("draw").random()


def test_removing_all_that_draft_in_the_middle_of_a_round(gpt):
    exits = {1: 0.2, 4: 0.2}
    gone, other, later = (
        sequence(PROMPTS[0], exits, True),
        sequence(PROMPTS[1], exits),
        sequence(PROMPTS[2], exits, True),
    )
    with torch.inference_mode():
        session = new_session(gpt, 3)
        session.add([gone, other])
        while not gone.drafts:
            session.step()
        session.remove(gone)
        session.step()
        session.add([later])
        while session.running:
            session.step()
    assert other.tokens == generate_uncached(gpt, other.prompt, STEPS, exits).tokens
    assert later.tokens == full_text(gpt, tuple(later.prompt))


def test_sampled_tokens_depend_on_the_seed_alone(gpt):
    exits, options = {1: 0.5, 4: 0.5}, dict(temperature=1.5, top_k=20)
    for lossless in (False, True):
        alone = [sequence(p, exits, lossless, seed=i, **options) for i, p in enumerate(PROMPTS)]
        together = [sequence(p, exits, lossless, seed=i, **options) for i, p in enumerate(PROMPTS)]
        for s in alone:
            run(gpt, [s])
        run(gpt, together, slots=5)
        if not lossless:  # rounds, and with them random numbers, depend on who drafts together
            assert [s.tokens for s in alone] == [s.tokens for s in together]
        again = [sequence(p, exits, lossless, seed=i, **options) for i, p in enumerate(PROMPTS)]
        run(gpt, again, slots=5)
        assert [s.tokens for s in again] == [s.tokens for s in together]
        other = sequence(PROMPTS[0], exits, lossless, seed=99, **options)
        run(gpt, [other])
        assert other.tokens != alone[0].tokens


def judged(drafts, distributions, rng, ahead):
    """How many drafts are accepted, and the token behind them."""
    from nemo_ee.decoding.drafts.verification import Acceptance
    from nemo_ee.decoding.transfer import to_host

    acceptance = Acceptance(drafts, distributions, rng, ahead)
    return acceptance.outcome(*to_host(*acceptance.readings()))


def test_tokens_drawn_ahead_are_those_drawn_when_they_are_needed():
    from nemo_ee.decoding.generated_sequence import Draft

    generator, found = torch.Generator().manual_seed(1), set()
    for seed in range(200):
        count = seed % 4
        p = (3 * torch.rand(count + seed // 4 % 2, 9, generator=generator)).softmax(-1)
        if not len(p):
            continue
        q = (p[:count].log() + torch.rand(count, 9, generator=generator)).softmax(-1)
        drafts = [Draft(int(row.argmax()), 1, 0.5, row) for row in q]
        now, ahead = (judged(drafts, p, random.Random(seed), ahead) for ahead in (False, True))
        assert now == ahead
        found.add((now[0] < count, now[1] is None))
    assert found == {(True, False), (False, False), (False, True)}


@pytest.mark.parametrize("ahead", [False, True])
def test_accepting_keeps_the_distribution(ahead):
    """Empirical frequencies of the first token against the full model's, chi-square at 1e-6."""
    from scipy.stats import chi2

    from nemo_ee.decoding.generated_sequence import Draft
    from nemo_ee.decoding.sampling import draw

    generator, rng, size, trials = torch.Generator().manual_seed(5), random.Random(11), 7, 20_000
    p, q = (torch.rand(2, size, generator=generator, dtype=torch.float64) ** 3).unbind()
    p[2] = q[4] = 0.0
    p, q = p / p.sum(), q / q.sum()
    counts, wrong = torch.zeros(size), torch.zeros(size)
    for _ in range(trials):
        token = int(draw(q[None], [rng.random()]))
        good, following = judged([Draft(token, 1, 0.5, q)], p[None], rng, ahead)
        counts[token if good else following] += 1
        wrong[token] += 1
    possible = p > 0
    assert not counts[~possible].any()

    def statistic(observed):
        expected = trials * p[possible]
        return float((((observed[possible] - expected) ** 2) / expected).sum())

    limit = chi2.isf(1e-6, int(possible.sum()) - 1)
    assert statistic(counts) < limit < statistic(wrong), "and the test sees a wrong distribution"


@pytest.mark.parametrize("top_k", [0, 4])
def test_lossless_sampling_has_the_full_models_distribution(gpt, top_k):
    """Pairs of tokens behind a prompt, against the exact joint distribution of the full model."""
    from scipy.stats import chi2

    trials, exits, limit = 3000, {1: 0.0, 3: 0.0}, 3
    options = dict(temperature=0.35, top_k=top_k)
    batch = [sequence(PROMPTS[0], exits, True, limit=limit, seed=i, **options) for i in range(trials)]
    run(gpt, batch, slots=500)
    pairs = [tuple(s.tokens[:2]) for s in batch]
    expected = joint_of_two(gpt, PROMPTS[0], **options)
    common = {pair: p for pair, p in expected.items() if p * trials >= 5}
    rest = 1 - sum(common.values())
    observed = {pair: pairs.count(pair) for pair in common}
    terms = [(observed[pair] - p * trials) ** 2 / (p * trials) for pair, p in common.items()]
    others = trials - sum(observed.values())
    terms.append((others - rest * trials) ** 2 / (rest * trials) if rest * trials >= 5 else 0.0)
    assert len(common) > 5
    assert sum(terms) < chi2.isf(1e-6, len(terms) - 1)
    assert all(pair in expected for pair in pairs), "never a token that the full model cannot emit"
    assert sum(s.statistics.drafts for s in batch) > trials // 2


def joint_of_two(gpt, prompt, temperature, top_k):
    """Probability of every pair of tokens behind a prompt."""

    def following(text):
        states = gpt.forward_states(torch.tensor([text]), torch.arange(len(text))[None], None)
        logits = (states.output[-1, 0] @ gpt.output_weight().T)[: gpt.true_vocab_size] / temperature
        if top_k:
            logits[logits < logits.topk(top_k).values[-1]] = float("-inf")
        return logits.softmax(-1)

    out = {}
    with torch.no_grad():
        for first, p in enumerate(following(prompt).tolist()):
            if p > 1e-5:
                for second, p2 in enumerate(following([*prompt, first]).tolist()):
                    if p2 > 0:
                        out[first, second] = p * p2
    return out


class AsksAtRandom(EagerDrafts):
    """Asks some number of exits in a step, whatever they cost, so that they are skipped in every pattern."""

    def ask(self, rows, others):
        return self.random.randint(0, len(self.layers))


def in_its_own_way(gpt, s):
    """The uncached text of a sequence that asks the exits alone at which its tokens left, if they are sure enough."""
    taken = [{n: s.request.exits[n]} if n in s.request.exits else {} for n in s.exit_layers]
    return generate_uncached(gpt, s.prompt, len(s.tokens), taken)


WAYS = [
    ("block, MLP, linear, untied", True),
    ("norm, tied", False),
    ("linear, shortlist", True),
    ("MLP, untied", False),
]
SLOW_WAYS = [pytest.param(head, not kernels, marks=pytest.mark.slow) for head, kernels in WAYS]


@pytest.mark.parametrize("head, kernels", [*WAYS, *SLOW_WAYS])
def test_what_is_skipped_changes_no_answer_of_what_is_asked(head, kernels, monkeypatch):
    """Random arrivals, cancellations and lossless rounds, and exits skipped in every pattern: a token is its exit's
    answer to the text before it, or full depth's; a lossless text is full depth's, and one whose exits are asked always
    is its own."""
    from nemo_ee.decoding.assumed_prices import prices_of
    from nemo_ee.decoding.decoding_model import DecodingModel

    if not kernels:
        monkeypatch.setenv("NEMO_EE_CPU_KERNELS", "0")
    config = tiny_model_config(
        head=HEADS[head], exits=LAYERS, share_embeddings_and_output_weights="untied" not in head
    )
    gpt, rng = tiny_model(config, dtype=torch.float64).gpt, random.Random(head)
    policy = AsksAtRandom(prices_of(DecodingModel(gpt)), LAYERS, seed=3)
    sequences = []
    for n in range(9):
        prompt = [rng.randrange(6, 200) for _ in range(rng.randint(1, 12))]
        exits = {k: rng.choice([0.0, 0.01, 0.02, 0.05, 0.3]) for k in LAYERS if rng.random() < 0.8}
        sequences.append(sequence(prompt, exits, n % 3 == 0, limit=rng.randint(2, 14), always=n % 3 == 1))
    waiting, cancelled = list(sequences), set()
    with torch.inference_mode():
        session = new_session(gpt, 4, policy=policy)
        while waiting or session.running:
            batch, waiting = waiting[: min(session.free, 2)], waiting[min(session.free, 2) :]
            if batch:
                session.add(batch)
            if session.running and rng.random() < 0.03:
                gone = rng.choice(session.running)
                cancelled.add(gone)
                session.remove(gone)
            if session.running:
                session.step()
    skipped = 0
    for s in sequences:
        if s.request.lossless:
            assert s.tokens == full_text(gpt, tuple(s.prompt), s.limit)[: len(s.tokens)]
            continue
        always = generate_uncached(gpt, s.prompt, len(s.tokens), s.request.exits)
        reference = always if s.request.always else in_its_own_way(gpt, s)
        assert (s.tokens, s.exit_layers) == (reference.tokens, reference.exit_layers)
        assert s.confidences == pytest.approx(reference.confidences, rel=1e-9)
        skipped += s.exit_layers != always.exit_layers
    assert skipped and len(cancelled) < len(sequences)
