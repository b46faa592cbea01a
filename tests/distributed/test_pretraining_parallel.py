# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Gradients and steps of every layout equal plain autograd of the written objective in one process.

Float64, but for the final exit's loss, which megatron-core computes in float32: its rounding (6e-8) reaches
every gradient, 1e-7 of its largest element was seen. AdamW divides by the gradient, which makes more of it in
elements that are almost zero: two steps of rate 2e-3 differ by up to 4e-6. Statistics that are logged while
training are those of plain sums over tokens: to that rounding in the first step, later with weights that differ.
Agreement is a share of tokens, so one equal maximum that falls otherwise would show.
"""

import pytest
import torch

from tests.support.pretraining import Case, largest_gap, pretrain, pretrain_one
from tests.support.tiny_gpt import GPT3, HEADS
from tests.support.tuning import Layout, write_text

GRADIENT_TOLERANCE, WEIGHT_TOLERANCE = 1e-6, 1e-3
FIRST_STATISTICS_TOLERANCE, STATISTICS_TOLERANCE = 1e-6, 1e-4

LAYOUTS = {
    "one process": Layout(),
    "TP2 x DP2": Layout(tp=2, dp=2),
    "PP2 of 3 and 5 layers": Layout(pp=2, first=3),
    "PP4": Layout(pp=4),
    "SP x PP2": Layout(tp=2, pp=2, sp=True),
    "DP2 x PP2": Layout(dp=2, pp=2),
}
SLOW_LAYOUTS = {
    "TP2": Layout(tp=2),
    "SP": Layout(tp=2, sp=True),
    "DP2": Layout(dp=2),
    "TP2 x PP4": Layout(tp=2, pp=4),
    "SP x PP4": Layout(tp=2, pp=4, sp=True),
    "SP x PP2 x DP2": Layout(tp=2, pp=2, dp=2, sp=True),
    "PP4 x DP2": Layout(pp=4, dp=2),
}


def full(method: str, layers: int) -> dict:
    """Overrides for full recomputation of activations."""
    return dict(
        activations_checkpoint_granularity="full",
        activations_checkpoint_method=method,
        activations_checkpoint_num_layers=layers,
    )


SELECTIVE = dict(activations_checkpoint_granularity="selective")
UNTIED = dict(share_embeddings_and_output_weights=False)
BEFORE = dict(pre_exit=True)


def section(head: str, layers: list[int], **training) -> dict:
    """An `early_exit` section."""
    chosen = HEADS[head]
    trained = dict(train_projection=True) if chosen["projection"] != "tied" else {}
    return dict(layers=layers, init="random", head={**chosen, **trained}, training=training)


CASES = {
    "tied": Case(section("norm, tied", [2, 4, 6]), steps=4),
    "tied, pre_exit, uniform": Case(section("norm, tied", [2, 4, 6, 8], **BEFORE), full("uniform", 1)),
    "tied, untied embeddings": Case(section("norm, tied", [2, 4], loss_chunk_tokens=7), UNTIED),
    "tied, uniform 2": Case(
        section("norm, tied", [1, 3, 6], loss_weights=[0.3, 0.0, 1.5]), full("uniform", 2)
    ),
    "MLP, every layer": Case(section("MLP, untied", [1, 2, 3, 4, 5, 6, 7, 8])),
    "linear, last layer": Case(section("linear, shortlist", [8], **BEFORE), SELECTIVE),
    "block, first layers, by confidence": Case(
        section("block, shortlist", [1, 2], token_weighting="confidence"), full("block", 1)
    ),
    "everything, pre_exit": Case(
        section("block, MLP, linear, untied", [2, 3, 6], **BEFORE),
        {**UNTIED, **full("block", 2), "qk_layernorm": True},
    ),
    "warming up": Case(
        section(
            "block, MLP, linear, untied", [3, 8], schedule="cosine", initial_factor=0.2, schedule_steps=3
        ),
        GPT3,
    ),
    "loss scale": Case(section("block, MLP, linear, untied", [2, 5]), loss_scale=64.0),
    "rotating": Case(section("MLP, untied", [2, 5, 7], curriculum="rotational"), SELECTIVE),
}
"""Every kind of head, every set of layers, both placements, every kind of recomputation and of embeddings."""

DROPPED = {
    "layers dropped": Case(section("norm, tied", [2, 4, 6], layer_dropout=dict(max_rate=0.7))),
    "layers dropped and recomputed": Case(
        section("norm, tied", [2, 4, 6], layer_dropout=dict(max_rate=0.7)), full("uniform", 1)
    ),
}
"""Which samples skip a layer depends on the data-parallel rank, so these are for layouts without it."""

FEW = {"few micro-batches": Case(section("norm, tied", [2, 4, 6], **BEFORE), dict(micro_batch_size=4))}
"""Two micro-batches, or one with data parallelism: fewer than stages."""

TENSOR_PARALLEL = [
    "tied, pre_exit, uniform",
    "tied, untied embeddings",
    "MLP, every layer",
    "linear, last layer",
    "block, first layers, by confidence",
    "everything, pre_exit",
]
"""Every kind of head; collectives of processes that share cores take long."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def plain(text, workers):
    return workers(1).run(pretrain, text, {**CASES, **DROPPED}, Layout(), True, timeout=600)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_equals_plain_autograd(layout, text, plain, workers):
    chosen = TENSOR_PARALLEL if LAYOUTS[layout].tp > 1 else [*CASES, *DROPPED]
    compare(text, plain, workers, LAYOUTS[layout], cases_of(LAYOUTS[layout], chosen))


def cases_of(layout: Layout, names: list[str]) -> dict[str, Case]:
    cases = CASES if layout.dp > 1 else {**CASES, **DROPPED}
    return {name: cases[name] for name in names if name in cases}


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=4)], ids=["one process", "PP4"])
def test_without_weight_it_is_the_plain_gpt_bit_for_bit(layout, text, workers):
    weightless = section("norm, tied", [2, 4, 6], loss_weights=[0.0, 0.0, 0.0])
    cases = {"ours": Case(weightless), "plain": Case(weightless, without_targets=True)}
    for rank in workers(layout.world_size).run(only_backbone, text, cases, layout, timeout=600):
        assert rank["ours"][0] == rank["plain"][0]
        for key, value in rank["plain"][1].items():
            assert rank["ours"][1][key].equal(value), key


def only_backbone(text, cases, layout):
    """Losses and final weights of the backbone; what no exit reads has no gradient in the plain model."""
    found = {}
    for name, case in cases.items():
        outcome = pretrain_one(text, case, layout, plain=False, dtype=torch.float32, whole_gradients=False)
        weights = {key: value for key, value in outcome.final.items() if not key.startswith("exits.")}
        found[name] = (outcome.losses, weights)
    return found


@pytest.mark.parametrize("layout", ["PP4", "DP2 x PP2"])
def test_fewer_micro_batches_than_stages(layout, text, workers):
    plain = workers(1).run(pretrain, text, FEW, Layout(), True, timeout=600)[0]
    compare(text, plain, workers, LAYOUTS[layout], FEW)


@pytest.mark.slow
@pytest.mark.parametrize("layout", SLOW_LAYOUTS)
def test_another_layout_equals_plain_autograd(layout, text, plain, workers):
    compare(text, plain, workers, SLOW_LAYOUTS[layout], cases_of(SLOW_LAYOUTS[layout], [*CASES, *DROPPED]))


def compare(text, plain, workers, layout: Layout, cases: dict[str, Case]) -> list[dict]:
    """Compares all ranks of a layout with the reference's outcomes; returns the ranks' own."""
    found = workers(layout.world_size).run(pretrain, text, cases, layout, timeout=600)
    for name in cases:
        expected = plain[name]
        reached = {key for rank in found for key in rank[name].gradients}
        assert reached == expected.gradients.keys(), f"{name}: the stages together hold every parameter"
        for rank in found:
            gap, where = largest_gap(rank[name].gradients, expected.gradients)
            assert gap < GRADIENT_TOLERANCE, (name, where, gap)
            gap, where = largest_gap(rank[name].final, expected.final)
            assert gap < WEIGHT_TOLERANCE, (name, where, gap)
        statistics = {key: value for key, value in expected.logged.items() if key.startswith("val_")}
        assert len(statistics) >= 6
        logged = {key: found[0][name].logged[key] for key in statistics}
        assert logged == pytest.approx(statistics, rel=STATISTICS_TOLERANCE), name
        for rank in found:
            same_statistics(rank[name].statistics, expected.statistics)
        same_copies([rank[name].copies for rank in found], layout)
    return found


def same_statistics(found: list[dict], expected: list[dict]) -> None:
    """Of every step, the first one with a tolerance of its own."""
    assert len(found) == len(expected)
    for step, (mine, plain) in enumerate(zip(found, expected, strict=True)):
        assert len(plain) >= 6, "the final exit's loss and confidence, and four values of an exit"
        tolerance = STATISTICS_TOLERANCE if step else FIRST_STATISTICS_TOLERANCE
        assert mine == pytest.approx(plain, rel=tolerance), step


def same_copies(copies: list[list], layout: Layout) -> None:
    """All copies of a shard of the output weight are equal, bit for bit, after every step."""
    for shard in range(layout.tp):
        held = [c for rank, c in enumerate(copies) if rank % layout.tp == shard and c]
        for other in held[1:]:
            for mine, first in zip(other, held[0], strict=True):
                assert mine.equal(first)
