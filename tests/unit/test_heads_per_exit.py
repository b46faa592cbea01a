# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""`early_exit.head` as a list: each exit has modules of its own, and faults name the entry."""

import pytest
import torch
from omegaconf import OmegaConf

from nemo_ee.config import parse_early_exit
from nemo_ee.head_config import HeadConfig
from tests.support.tiny_gpt import HEADS, tiny_model, tiny_model_config
from tests.support.uncached import generate_uncached
from tests.unit.test_config import faults_of
from tests.unit.test_exit_init import build, collect, fit, ridge
from tests.unit.test_key_rules import faults
from tests.unit.test_session import PROMPTS, full_text, run, sequence

TIED = dict(mlp="none", linear=False, projection="tied")
LISTS = [
    ["norm, tied", "block, MLP, linear, untied", "linear, shortlist"],
    ["block, shortlist", "MLP, untied", "norm, tied"],
]


def test_each_exit_has_its_own():
    raw = {"layers": [3, 6, 9], "init": "copy", "head": [TIED, None, {"mlp": True, "shortlist_size": 60}]}
    config = parse_early_exit(raw, 12)
    assert config.heads[3].projection == "tied" and not config.heads[3].linear
    assert config.heads[6] == HeadConfig(), "null is an entry of defaults"
    assert config.heads[9].mlp == "beside" and config.heads[9].shortlist_size == 60, (
        "in the words of before, too"
    )
    stored = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(config.to_dict())))
    assert parse_early_exit(stored, 12) == config
    one = parse_early_exit({**raw, "head": TIED}, 12)
    assert set(one.heads.values()) == {HeadConfig(**TIED)} and list(one.heads) == [3, 6, 9]


WRONG = {
    "too few": ([TIED], "head", "1 heads for 2 exit layers", "one per exit layer"),
    "none": ([], "head", "0 heads for 2 exit layers", "one per exit layer"),
    "unknown key": ([TIED, {**TIED, "nrom": True}], "head[1].nrom", "unknown key", "did you mean norm?"),
    "beside nothing": (
        [TIED, {**TIED, "mlp": "beside"}],
        "head[1].mlp",
        "lacks",
        "++model.early_exit.head.1.mlp=",
    ),
    "a step": (
        [{"mlp": "residual", "shortlist_size": 60}, TIED],
        "head[0].mlp",
        "beside",
        "++model.early_exit.head.0.mlp=beside",
    ),
    "trains what is not its own": (
        [TIED, {**TIED, "train_projection": True}],
        "head[1].train_projection",
        "frozen",
        "untied",
    ),
    "a long shortlist": ([{}, TIED], "head[0].shortlist_size", "1..1000", "head.0.projection=tied"),
}


@pytest.mark.parametrize("case", WRONG)
def test_faults_name_the_entry(case):
    head, key, rule, remedy = WRONG[case]
    (fault,) = faults_of({"layers": [6, 12], "init": "copy", "head": head})
    assert fault.key == f"model.early_exit.{key}"
    assert rule in fault.rule and remedy in fault.remedy


def test_all_entries_faults_are_listed():
    found = faults_of({"layers": [6, 12], "init": "copy", "head": [{**TIED, "nrom": 1}, {**TIED, "blok": 1}]})
    assert [fault.key for fault in found] == [
        "model.early_exit.head[0].nrom",
        "model.early_exit.head[1].blok",
    ]


def test_what_ridge_lacks_is_said_of_the_exit():
    (fault,) = faults_of({"layers": [6, 12], "head": [{"shortlist_size": 60}, TIED]})
    assert fault.key == "model.early_exit.init" and "head.1.linear=true" in fault.remedy


@pytest.mark.parametrize("script", ["tuning", "pretraining"])
def test_on_the_command_line(script):
    entries = "{mlp:none,linear:false,projection:tied},{mlp:residual,linear:false,projection:untied}"
    given = ["model.early_exit.layers=[2,4]", f"+model.early_exit.head=[{entries}]"]
    given = ["~model.early_exit.head", *given, "model.early_exit.init=random"]
    assert faults(script, given) == {}
    found = faults(script, [*given, "++model.early_exit.head.1.linear=true"])
    assert list(found) == ["model.early_exit.head[1].mlp"]
    both = ["++model.early_exit.head.1.linear=true", "++model.early_exit.head.1.mlp=beside"]
    assert faults(script, [*given, *both]) == {}


def test_an_exit_without_parameters_is_not_tuned():
    given = ["~model.early_exit.head", "model.early_exit.layers=[2,4]", "model.early_exit.init=random"]
    bare = "{block:false,mlp:none,norm:false,linear:false,projection:tied}"
    given.append(f"+model.early_exit.head=[{{}},{bare}]")
    found = faults("tuning", given)
    assert list(found) == ["model.early_exit.head[1]"]
    remedy = "++model.early_exit.head.1.norm=true"
    assert remedy in found["model.early_exit.head[1]"].remedy
    assert faults("tuning", [*given, remedy]) == {}


@pytest.mark.parametrize("heads", LISTS, ids=str)
def test_texts_are_those_of_the_uncached_model(heads):
    config = tiny_model_config(
        [2, 4, 6], [HEADS[head] for head in heads], share_embeddings_and_output_weights=False
    )
    gpt = tiny_model(config, dtype=torch.float64).gpt
    for n, head in zip((2, 4, 6), heads, strict=True):
        exit_head = gpt.exits[str(n)]
        assert (exit_head.block is not None) == ("block" in head) and exit_head.projection.kind in head
        assert (exit_head.mlp is not None) == ("MLP" in head)
    exits = {2: 0.6, 4: 0.5, 6: 0.4}
    early = [sequence(prompt, exits) for prompt in PROMPTS]
    lossless = [sequence(prompt, exits, True) for prompt in PROMPTS]
    run(gpt, [*early, *lossless], layers=[2, 4, 6])
    for one, other in zip(early, lossless, strict=True):
        reference = generate_uncached(gpt, one.prompt, one.limit, exits)
        assert (one.tokens, one.exit_layers) == (reference.tokens, reference.exit_layers)
        assert other.tokens == full_text(gpt, tuple(one.prompt))
    assert len({layer for one in early for layer in one.exit_layers}) > 2


def test_the_closed_form_fits_each_ones_bucket():
    """Two exits share a shortlist and one has its own; each bucket is the regression of what its list leaves out."""
    heads = [dict(mlp=False, projection="shortlist", shortlist_size=size) for size in (30, 60, 30)]
    gpt = build(heads, (2, 4, 6))
    order = torch.randperm(gpt.true_vocab_size, generator=torch.Generator().manual_seed(1))
    from nemo_ee.modeling.first_weights.exit_init import initialise_projections

    initialise_projections(gpt, order, None)
    fit(gpt)
    _, final = collect(gpt)
    logits = final @ gpt.output_weight().detach().T
    for n, size in zip((2, 4, 6), (30, 60, 30), strict=True):
        projection = gpt.exits[str(n)].projection
        assert projection.token_ids.tolist() == sorted(order[:size].tolist()), "the most frequent come first"
        others = [token for token in range(gpt.true_vocab_size) if token not in set(order[:size].tolist())]
        solution = ridge([final], logits[:, others].logsumexp(-1)[:, None])
        found = torch.cat([projection.bucket_weight, projection.bucket_bias]).detach().double()
        torch.testing.assert_close(found, torch.from_numpy(solution[:, 0]), rtol=1e-5, atol=1e-7)
