# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Megatron's distributed optimizer with overlapped gradient reduction makes the steps of plain AdamW."""

import pytest
import torch

from tests.distributed.test_pretraining_parallel import BEFORE, UNTIED, full, same_copies, section
from tests.support.pretraining import Case, largest_gap, pretrain
from tests.support.tuning import OPTIMIZER, Layout, write_text

DISTRIBUTED = dict(OPTIMIZER, name="mcore_distributed_optim")
OVERLAPPED = dict(DISTRIBUTED, overlap_grad_sync=True, overlap_param_sync=True)
OPTIMIZERS = {
    "distributed": DISTRIBUTED,
    "overlapped gradients": dict(DISTRIBUTED, overlap_grad_sync=True),
    "overlapped": OVERLAPPED,
    "overlapped, small buckets": dict(OVERLAPPED, ddp_bucket_size=1000),
}
BARE = dict(mlp=False, norm=False, linear=True, projection="tied")
"""Large enough that no exit's weight shares a small bucket with the output layer's, which exits read before it."""
ALL = tuple(OPTIMIZERS)
GATHERED = ("overlapped", "overlapped, small buckets")
HEADS = {
    "tied": section("norm, tied", [2, 4, 6]),
    "tied, untied embeddings": dict(layers=[2, 4], init="random", head=BARE),
    "tied twice on a stage": section("norm, tied", [1, 2, 3, 4, 7, 8], **BEFORE),
    "untied": section("MLP, untied", [2, 6]),
    "shortlist": section("linear, shortlist", [1, 5]),
    "rotating": section("norm, tied", [2, 6], curriculum="rotational"),
    "rotating, untied": section("MLP, untied", [2, 4, 6], curriculum="rotational"),
    "filled": section("norm, tied", [2, 4, 6], bubble_filling=dict(warmup=True, cooldown=True)),
    "block": section("block, MLP, linear, untied", [3, 8], **BEFORE),
}
OVERRIDES = {
    "tied, untied embeddings": UNTIED,
    "tied twice on a stage": full("uniform", 1),
    "block": UNTIED,
    "shortlist": full("block", 1),
}
LAYOUTS = {
    "DP1": (Layout(), {"untied": GATHERED}),
    "DP2": (
        Layout(dp=2),
        {
            "tied twice on a stage": ("distributed", *GATHERED),
            "shortlist": GATHERED,
            "rotating, untied": GATHERED,
            "tied, untied embeddings": GATHERED,
        },
    ),
    "PP4": (Layout(pp=4), {"tied": ALL, "rotating": GATHERED, "filled": GATHERED}),
    "DP2 x PP2": (
        Layout(dp=2, pp=2),
        {"tied": ALL, "tied twice on a stage": GATHERED, "untied": GATHERED},
    ),
    "DP2 x PP3": (
        Layout(dp=2, pp=3, first=2, last=3),
        {"tied": GATHERED, "rotating": GATHERED, "rotating, untied": GATHERED, "block": GATHERED}
        | {"tied, untied embeddings": GATHERED},
    ),
    "DP2 x PP4": (Layout(dp=2, pp=4), {"tied": ALL, "filled": ALL}),
}
SLOW = {"DP2 x PP3", "DP2 x PP4"}
VALIDATED = dict(val_check_interval=3, limit_val_batches=1)
"""Validation after a step needs parameters that would be gathered in the next one."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in LAYOUTS]
)
def test_steps_are_those_of_adamw(name, text, workers):
    layout, heads = LAYOUTS[name]
    cases = {}
    for head, kinds in heads.items():
        for kind in ("adamw", *kinds):
            overrides = {**OVERRIDES.get(head, {}), "optim": {"adamw": OPTIMIZER, **OPTIMIZERS}[kind]}
            cases[f"{head} | {kind}"] = Case(HEADS[head], overrides, steps=4, trainer=VALIDATED)
    found = workers(layout.world_size).run(pretrain, text, cases, layout, False, torch.float32, timeout=600)
    for head, kinds in heads.items():
        for kind in kinds:
            for rank in found:
                mine, plain = rank[f"{head} | {kind}"], rank[f"{head} | adamw"]
                assert mine.losses == pytest.approx(plain.losses, rel=1e-5), (head, kind)
                for what, value in plain.logged.items():
                    if what.startswith(("val_loss", "val_confidence")):
                        assert mine.logged[what] == pytest.approx(value, rel=1e-5), (head, kind, what)
                gap, where = largest_gap(mine.final, plain.final)
                assert gap < 1e-3, (head, kind, where, gap)
            same_copies([rank[f"{head} | {kind}"].copies for rank in found], layout)
