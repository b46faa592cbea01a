# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Megatron's distributed optimizer with overlapped gradient reduction makes the steps of plain AdamW."""

import pytest
import torch

from tests.distributed.test_pretraining_parallel import BEFORE, full, same_copies, section
from tests.support.pretraining import Case, largest_gap, pretrain
from tests.support.tuning import OPTIMIZER, Layout, write_text

DISTRIBUTED = dict(OPTIMIZER, name="mcore_distributed_optim")
OVERLAPPED = dict(DISTRIBUTED, overlap_grad_sync=True, overlap_param_sync=False)
HEADS = {
    "tied": section("norm, tied", [2, 4, 6]),
    "tied twice on a stage": section("norm, tied", [1, 2, 3, 4, 7, 8], **BEFORE),
    "untied": section("MLP, untied", [2, 6]),
    "rotating": section("norm, tied", [2, 6], curriculum="rotational"),
    "filled": section("norm, tied", [2, 4, 6], bubble_filling=dict(warmup=True, cooldown=True)),
}
LAYOUTS = {
    "DP2": (Layout(dp=2), ["tied twice on a stage"]),
    "PP4": (Layout(pp=4), ["tied", "rotating", "filled"]),
    "DP2 x PP2": (Layout(dp=2, pp=2), ["tied", "tied twice on a stage", "untied"]),
    "DP2 x PP4": (Layout(dp=2, pp=4), ["tied", "filled"]),
}
SLOW = {"DP2 x PP4"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in LAYOUTS]
)
def test_steps_are_those_of_adamw(name, text, workers):
    layout, heads = LAYOUTS[name]
    cases = {}
    for head in heads:
        for kind, optimizer in (
            ("adamw", OPTIMIZER),
            ("distributed", DISTRIBUTED),
            ("overlapped", OVERLAPPED),
        ):
            recomputed = full("uniform", 1) if head == "tied twice on a stage" else {}
            cases[f"{head} | {kind}"] = Case(HEADS[head], {**recomputed, "optim": optimizer}, steps=4)
    found = workers(layout.world_size).run(pretrain, text, cases, layout, False, torch.float32, timeout=600)
    for head in heads:
        for kind in ("distributed", "overlapped"):
            for rank in found:
                mine, plain = rank[f"{head} | {kind}"], rank[f"{head} | adamw"]
                assert mine.losses == pytest.approx(plain.losses, rel=1e-5), (head, kind)
                gap, where = largest_gap(mine.final, plain.final)
                assert gap < 1e-3, (head, kind, where, gap)
            same_copies([rank[f"{head} | {kind}"].copies for rank in found], layout)
