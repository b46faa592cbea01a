# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Chunked losses and their hand-written gradients against full logits and autograd, in float64."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from nemo_ee.config import ExitObjective, HeadConfig
from nemo_ee.training.exit_loss import Statistic
from tests.support.tiny_gpt import tiny_model, tiny_model_config

HIDDEN, VOCABULARY, PADDED, TOKENS, KEPT = 12, 37, 48, 23, 9
SCALE, WEIGHTS = 0.37, {2: 1.0, 5: 0.6}

PROJECTIONS = {
    "tied": HeadConfig(projection="tied"),
    "untied": HeadConfig(projection="untied", train_projection=True),
    "untied, frozen": HeadConfig(projection="untied"),
    "shortlist": HeadConfig(projection="shortlist", shortlist_size=KEPT, train_projection=True),
    "shortlist, frozen": HeadConfig(projection="shortlist", shortlist_size=KEPT),
    "shortlist of all": HeadConfig(projection="shortlist", shortlist_size=VOCABULARY, train_projection=True),
}
OBJECTIVES = {
    "ce": ExitObjective(),
    "kl": ExitObjective(ce_weight=0.0, kl_weight=0.8, argmax_weight=0.0),
    "argmax": ExitObjective(ce_weight=0.0, kl_weight=0.0, argmax_weight=1.3),
    "mix": ExitObjective(ce_weight=0.2, kl_weight=0.5, argmax_weight=0.3),
}


@pytest.fixture(scope="module")
def transformer_config():
    """Of a model in this process, which brings up Megatron's groups of one rank."""
    config = tiny_model(tiny_model_config()).gpt.config
    config = dataclasses.replace(config, hidden_size=HIDDEN, num_attention_heads=2, num_query_groups=2)
    config.params_dtype = torch.float64
    return config


@dataclasses.dataclass
class Problem:
    """Random inputs of `exit_losses`; large logits, so that confidences differ between tokens."""

    exits: dict
    output_weight: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    teacher: object


def problem(transformer_config, head: HeadConfig, seed: int = 0) -> Problem:
    from nemo_ee.modeling.projection import ExitProjection
    from nemo_ee.training.exit_loss import ExitInput

    torch.manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    exits = {}
    for n, weight in WEIGHTS.items():
        projection = ExitProjection(transformer_config, head, VOCABULARY, PADDED)
        for parameter in projection.parameters():
            parameter.data.normal_()
        if head.projection == "shortlist":
            projection.set_shortlist(torch.randperm(VOCABULARY)[: head.shortlist_size])
        exits[n] = ExitInput(random(TOKENS, HIDDEN), projection, weight)
    tied = ExitProjection(transformer_config, HeadConfig(projection="tied"), VOCABULARY, PADDED)
    mask = (torch.rand(TOKENS) > 0.3).double()
    return Problem(
        exits,
        random(PADDED, HIDDEN),  # padded rows are as large as others: they must be seen to be left out
        torch.randint(0, VOCABULARY, (TOKENS,)),
        mask,
        ExitInput(random(TOKENS, HIDDEN), tied),
    )


@dataclasses.dataclass
class Reference:
    """Sums as in `ExitLossResult.stats`, and gradients of the whole objective."""

    stats: dict
    state_gradients: dict
    parameter_gradients: dict


def reference(given: Problem, objective: ExitObjective) -> Reference:
    """All logits of all tokens at once, in the plainest form."""
    final = F.log_softmax(given.teacher.state @ given.output_weight[:VOCABULARY].T, -1)
    best = final.argmax(-1)
    nll = F.nll_loss(final, given.labels, reduction="none")
    sure = final.max(-1).values.exp()
    nothing = torch.zeros_like(nll)
    one = torch.ones_like(nll)
    columns = [nll, nothing, one, sure, nll, one]
    stats = {0: torch.stack([(column * given.mask).sum() for column in columns])}
    states, parameters = {}, {}
    for n, item in given.exits.items():
        projection = item.projection
        state = states[n] = item.state.clone().requires_grad_()
        own = dict(projection.named_parameters())
        mine = {name: own[name].detach().clone().requires_grad_() for name in own}
        if projection.kind == "shortlist":
            kept = projection.token_ids.tolist()
            rows = torch.tensor([kept.index(v) if v in kept else len(kept) for v in range(VOCABULARY)])
            logits = state @ mine["weight"][: len(kept)].T
            bucket = state @ mine["bucket_weight"] + mine["bucket_bias"]
            logits, emittable = torch.cat([logits, bucket[:, None]], 1), len(kept)
            target = torch.zeros_like(logits).index_add(1, rows, final.exp())
        else:
            weight = given.output_weight if projection.kind == "tied" else mine["weight"]
            logits, rows, emittable = state @ weight[:VOCABULARY].T, torch.arange(VOCABULARY), VOCABULARY
            target = final.exp()
        own_log = F.log_softmax(logits, -1)
        ce = F.nll_loss(own_log, rows[given.labels], reduction="none")
        hard = F.nll_loss(own_log, rows[best], reduction="none")
        kl = F.kl_div(own_log, target, reduction="none").sum(-1)
        confidence = own_log[:, :emittable].exp().max(-1).values.detach()
        agreement = (own_log[:, :emittable].argmax(-1) == rows[best]).double()
        u = confidence if objective.token_weighting == "confidence" else torch.ones_like(ce)
        loss = objective.ce_weight * ce + objective.kl_weight * kl + objective.argmax_weight * hard
        values = [ce, kl, agreement, confidence, u * loss, torch.ones_like(ce)]
        stats[n] = torch.stack([(value * given.mask).sum() for value in values])
        parameters |= {(n, name): value for name, value in mine.items()}
        (SCALE * WEIGHTS[n] * stats[n][Statistic.OBJECTIVE]).backward()
    return Reference(
        {n: value.detach() for n, value in stats.items()},
        {n: state.grad for n, state in states.items()},
        {key: value.grad for key, value in parameters.items()},
    )


def compute(given: Problem, objective: ExitObjective, scale=SCALE, teacher: bool = True):
    from nemo_ee.training.exit_loss import exit_losses

    return exit_losses(
        given.exits,
        given.output_weight,
        given.labels,
        given.mask,
        objective,
        given.teacher if teacher else None,
        scale,
    )


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("chunk", [5, 23, 100])
@pytest.mark.parametrize("weighting", ["none", "confidence"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_losses_and_gradients(transformer_config, projection, objective, weighting, chunk):
    given = problem(transformer_config, PROJECTIONS[projection])
    settings = dataclasses.replace(OBJECTIVES[objective], token_weighting=weighting, loss_chunk_tokens=chunk)
    result, expected = compute(given, settings), reference(given, settings)
    assert result.stats.keys() == expected.stats.keys()
    for n, values in expected.stats.items():
        close(result.stats[n], values)
    for n, gradient in expected.state_gradients.items():
        assert gradient.abs().max() > 1e-3, "the reference itself has a gradient"
        close(result.state_gradients[n], gradient)
    for n, item in given.exits.items():
        for name, parameter in item.projection.named_parameters():
            if parameter.requires_grad:
                wanted = expected.parameter_gradients[n, name]
                if name == "weight":
                    wanted = wanted.clone()
                    assert not wanted[item.projection.num_kept :].any(), "padding has no gradient"
                close(result.parameter_gradients[parameter], wanted)
            else:
                assert parameter not in result.parameter_gradients
            assert parameter.grad is None, "gradients are returned, not left behind"


@pytest.mark.parametrize("chunk", [5, 100])
def test_a_tied_weight_that_trains_sums_over_exits(transformer_config, chunk):
    given = problem(transformer_config, PROJECTIONS["tied"])
    given.output_weight.requires_grad_()
    settings = dataclasses.replace(OBJECTIVES["ce"], loss_chunk_tokens=chunk)
    result = compute(given, settings, teacher=False)
    total = 0.0
    for n, item in given.exits.items():
        logits = item.state @ given.output_weight[:VOCABULARY].T
        total += WEIGHTS[n] * (F.cross_entropy(logits, given.labels, reduction="none") * given.mask).sum()
    (SCALE * total).backward()
    assert list(result.parameter_gradients) == [given.output_weight]
    close(result.parameter_gradients[given.output_weight], given.output_weight.grad)


def test_best_tokens(transformer_config):
    given = problem(transformer_config, PROJECTIONS["untied"])
    result = compute(given, dataclasses.replace(OBJECTIVES["mix"], loss_chunk_tokens=7))
    final = given.teacher.state @ given.output_weight[:VOCABULARY].T
    assert result.best_tokens[0].equal(final.argmax(-1))
    for n, item in given.exits.items():
        logits = item.state @ item.projection.weight[:VOCABULARY].T
        assert result.best_tokens[n].equal(logits.argmax(-1))


def test_without_scale_statistics_only(transformer_config):
    given = problem(transformer_config, PROJECTIONS["shortlist"])
    result = compute(given, OBJECTIVES["mix"], scale=None)
    close(result.stats[5], reference(given, OBJECTIVES["mix"]).stats[5])
    assert result.state_gradients == {}
    assert result.parameter_gradients == {}


def test_without_a_teacher_cross_entropy_alone(transformer_config):
    given = problem(transformer_config, PROJECTIONS["shortlist"])
    result, expected = compute(given, OBJECTIVES["ce"], teacher=False), reference(given, OBJECTIVES["ce"])
    assert result.stats.keys() == given.exits.keys()
    for n in given.exits:
        for kind in (Statistic.LOSS, Statistic.CONFIDENCE, Statistic.OBJECTIVE, Statistic.TOKENS):
            close(result.stats[n][kind], expected.stats[n][kind])
        close(result.state_gradients[n], expected.state_gradients[n])


def test_a_scale_that_is_a_tensor(transformer_config):
    given = problem(transformer_config, PROJECTIONS["tied"])
    number = compute(given, OBJECTIVES["mix"]).state_gradients[5]
    close(
        compute(given, OBJECTIVES["mix"], torch.tensor(SCALE, dtype=torch.float64)).state_gradients[5], number
    )


def test_masked_tokens_have_no_gradient(transformer_config):
    given = problem(transformer_config, PROJECTIONS["untied"])
    gradient = compute(given, OBJECTIVES["mix"]).state_gradients[2]
    assert not gradient[given.mask == 0].any() and gradient[given.mask == 1].any(-1).all()


def test_logits_of_hundreds_stay_finite(transformer_config):
    given = problem(transformer_config, PROJECTIONS["shortlist"])
    for item in given.exits.values():
        item.state.mul_(200.0)
    given.teacher.state.mul_(200.0)
    result = compute(given, OBJECTIVES["mix"])
    for n in given.exits:
        assert torch.isfinite(result.stats[n]).all() and torch.isfinite(result.state_gradients[n]).all()


class _Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts operators, and casts of tensors of a shape."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape, self.seen, self.casts = shape, set(), 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        self.seen.add(name)
        if name == "_to_copy" and tuple(args[0].shape) == self.shape:
            self.casts += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("projection", ["untied", "shortlist", "tied"])
def test_no_chunk_waits_for_the_device_or_casts_weights_again(transformer_config, projection):
    given = problem(transformer_config, PROJECTIONS[projection])
    states = {n: dataclasses.replace(item, state=item.state.bfloat16()) for n, item in given.exits.items()}
    given = dataclasses.replace(
        given, exits=states, teacher=dataclasses.replace(given.teacher, state=given.teacher.state.bfloat16())
    )
    rows = given.output_weight if projection == "tied" else given.exits[2].projection.weight
    with _Watch(tuple(rows.shape)) as watch:
        compute(given, dataclasses.replace(OBJECTIVES["mix"], loss_chunk_tokens=5))
    assert not watch.seen & {"nonzero", "_local_scalar_dense", "item", "masked_select", "is_nonzero"}
    # Once for each exit, or for all that share a weight; an untied one has the shape of the teacher's.
    assert watch.casts == {"tied": 1, "untied": 2 + 1, "shortlist": 2}[projection]


def test_chunks_by_bytes(transformer_config, monkeypatch):
    from nemo_ee.modeling import vocab_parallel
    from nemo_ee.training import exit_loss

    monkeypatch.setattr(vocab_parallel, "CHUNK_BYTES", 4 * PADDED * 6 + 3)
    taken, whole = [], exit_loss._Distribution

    def spy(state, *args):
        taken.append(len(state))
        return whole(state, *args)

    monkeypatch.setattr(exit_loss, "_Distribution", spy)
    given = problem(transformer_config, PROJECTIONS["untied"])
    result = compute(given, dataclasses.replace(OBJECTIVES["ce"], loss_chunk_tokens=None), teacher=False)
    assert taken == [n for n in (6, 6, 6, 5) for _ in given.exits]
    close(result.stats[5][Statistic.LOSS], reference(given, OBJECTIVES["ce"]).stats[5][Statistic.LOSS])


@pytest.mark.parametrize("projection", ["tied", "shortlist"])
def test_statistics_of_narrow_weights_are_those_of_the_weights_widened(
    transformer_config, projection, monkeypatch
):
    from nemo_ee.modeling import projection as projections

    monkeypatch.setattr(projections, "WIDENED_BYTES", HIDDEN * 8 * 4 + 1)  # four rows at a time
    given = problem(transformer_config, PROJECTIONS[projection])
    for item in given.exits.values():
        item.projection.bfloat16()
    narrow = dataclasses.replace(given, output_weight=given.output_weight.bfloat16())
    found = compute(narrow, OBJECTIVES["mix"], scale=None)
    for item in given.exits.values():
        item.projection.double()
    wide = dataclasses.replace(given, output_weight=narrow.output_weight.double())
    for n, values in compute(wide, OBJECTIVES["mix"], scale=None).stats.items():
        close(found.stats[n], values)
