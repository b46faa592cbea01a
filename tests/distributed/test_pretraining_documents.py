# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Documents that share a sequence and see nothing of each other: attention of the backbone and of heads with a
block, positions and losses are those of a plain reference that makes masks and positions from the tokens."""

import pytest

from tests.distributed.test_pretraining_parallel import BEFORE, compare, full, section
from tests.support.pretraining import Case, largest_gap, pretrain
from tests.support.tiny_gpt import GPT3
from tests.support.tuning import Layout, write_text

APART = dict(
    get_attention_mask_from_fusion=False, data__reset_attention_mask=True, data__reset_position_ids=True
)
CASES = {
    "block, learned positions": Case(section("block, MLP, linear, untied", [2, 5]), {**GPT3, **APART}),
    "block, rotary, recomputed, pre_exit": Case(
        section("block, shortlist", [2, 4, 6], **BEFORE), {**APART, **full("uniform", 1)}
    ),
    "no block, ends of documents count": Case(
        section("norm, tied", [2, 4]), {**GPT3, **APART, "data__eod_mask_loss": False}
    ),
}
LAYOUTS = {"one process": Layout(), "PP2": Layout(pp=2), "SP": Layout(tp=2, sp=True)}
BLOCK = "block, learned positions"
TOGETHER = Case(CASES[BLOCK].early_exit, GPT3)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def plain(text, workers):
    return workers(1).run(pretrain, text, {**CASES, "together": TOGETHER}, Layout(), True)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_documents_stay_apart(layout, text, plain, workers):
    cases = {BLOCK: CASES[BLOCK]} if layout == "SP" else CASES  # collectives on shared cores take long
    compare(text, plain, workers, LAYOUTS[layout], cases)


def test_it_makes_a_difference_to_every_parameter_of_a_head(plain):
    """Otherwise equal gradients would say nothing."""
    for name, gradient in plain[BLOCK].gradients.items():
        if name.startswith("exits."):
            gap, _ = largest_gap({name: gradient}, plain["together"].gradients)
            assert gap > 1e-3, name
