# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The schedule that fills bubbles: Megatron's without fills, unbiased with them."""

import dataclasses

import numpy as np
import pytest

from tests.distributed.test_pretraining_parallel import BEFORE, full, section
from tests.support.pretraining import Case, largest_gap, pretrain
from tests.support.tuning import SEQUENCE, Layout, write_text

PLAIN = Case(section("norm, tied", [2, 4, 6]), steps=2)
CASES = {
    "tied": PLAIN,
    "recomputed, pre_exit": Case(section("MLP, untied", [2, 4], **BEFORE), full("uniform", 1)),
}
FILLS = {
    "warm-up": dict(warmup=True),
    "cool-down": dict(cooldown=True),
    "both": dict(warmup=True, cooldown=True),
    "both, slow backward": dict(warmup=True, cooldown=True, backward_ratio=3.0),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("layout", [Layout(pp=4), Layout(pp=2, dp=2)], ids=["PP4", "PP2 x DP2"])
def test_without_fills_it_is_megatrons(layout, text, workers):
    own = {name: dataclasses.replace(case, own_schedule=True) for name, case in CASES.items()}
    theirs = workers(layout.world_size).run(pretrain, text, CASES, layout, timeout=600)
    ours = workers(layout.world_size).run(pretrain, text, own, layout, timeout=600)
    for name in CASES:
        for mine, other in zip(ours, theirs, strict=True):
            assert mine[name].losses == other[name].losses
            for key, gradient in other[name].gradients.items():
                assert mine[name].gradients[key].equal(gradient), key
            for key, value in other[name].final.items():
                assert mine[name].final[key].equal(value), key


@pytest.fixture(scope="module")
def same_text(tmp_path_factory):
    """Text whose samples are all the same."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder, words = tmp_path_factory.mktemp("same"), np.random.default_rng(3).integers(1, 200, SEQUENCE)
    prefixes = {}
    for split in ("train", "validation"):
        builder = IndexedDatasetBuilder(f"{folder}/{split}.bin", dtype=np.uint16)
        document = np.tile(words, 200).tolist()
        builder.add_document(document, [len(document)])
        builder.finalize(f"{folder}/{split}.idx")
        prefixes[split] = [f"{folder}/{split}"]
    return {**prefixes, "test": None}


@pytest.mark.parametrize("layout", [Layout(pp=4), Layout(pp=3, first=1, last=2)], ids=["PP4", "PP3"])
def test_where_samples_are_alike_fills_change_no_gradient(layout, same_text, workers):
    """Each sample's gradient is the expected one then: a bias of the weighting would show in full."""
    unfilled = {"unfilled": PLAIN, "unfilled, pre_exit": CASES["recomputed, pre_exit"]}
    filled = {}
    for name, filling in FILLS.items():
        for base, case in (("unfilled", PLAIN), ("unfilled, pre_exit", CASES["recomputed, pre_exit"])):
            changed = {
                **case.early_exit,
                "training": {**case.early_exit["training"], "bubble_filling": filling},
            }
            filled[f"{base} | {name}"] = dataclasses.replace(case, early_exit=changed)
    found = workers(layout.world_size).run(pretrain, same_text, {**unfilled, **filled}, layout, timeout=600)
    for rank in found:
        for name in filled:
            gap, where = largest_gap(rank[name].gradients, rank[name.split(" | ")[0]].gradients)
            assert gap < 1e-6, (name, where, gap)


def test_fills_are_consumed_on_top_of_the_global_batch(text, workers):
    training = dict(bubble_filling=FILLS["both"])
    case = Case({**PLAIN.early_exit, "training": training}, steps=3)
    found = workers(4).run(
        pretrain, text, {"filled": case, "unfilled": dataclasses.replace(PLAIN, steps=3)}, Layout(pp=4)
    )
    assert found[0]["unfilled"].logged["consumed_samples"] == 3 * 8
    # P=4, r=2: two warm-up and two cool-down fills of two samples each
    assert found[0]["filled"].logged["consumed_samples"] == 3 * (8 + 2 * 4)
    assert found[3]["filled"].losses != found[3]["unfilled"].losses
