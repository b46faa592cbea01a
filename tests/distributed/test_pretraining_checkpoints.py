# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of pre-training in every layout, with every head and optimizer: a resumed run is the whole run.

Pairs of (pipeline size, tensor-parallel size, projection, optimizer, what is special) are covered, not all
combinations: faults of combinations are nearly always faults of two things that meet.
"""

from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_pretraining_parallel import BEFORE, UNTIED, full, section
from tests.support.pretraining import Case, Recorder, pretraining_config
from tests.support.tiny_gpt import fill
from tests.support.tuning import OPTIMIZER, Layout, resume_in, tuning_trainer, write_text

STEPS, SAVED_AT = 4, 2

LAYOUTS = {
    (pp, tp): Layout(pp=pp, tp=tp, **({"first": 2, "last": 3} if pp == 3 else {}))
    for pp in (1, 2, 3, 4)
    for tp in (1, 2)
}
SLOW = set(LAYOUTS) - {(1, 1), (3, 1)}
HEADS = {
    "tied": "norm, tied",
    "untied": "MLP, untied",
    "shortlist": "linear, shortlist",
}
O2 = dict(megatron_amp_O2=True, precision="bf16")
OPTIMIZERS = {
    "adamw": dict(optim=OPTIMIZER),
    "distributed": dict(optim=dict(OPTIMIZER, name="mcore_distributed_optim")),
    "O2": dict(optim=OPTIMIZER, **O2),
    "O2, distributed": dict(optim=dict(OPTIMIZER, name="mcore_distributed_optim"), **O2),
}
SPECIAL: dict[str, tuple[dict, dict]] = {  # of the exits' training, of the model
    "ramp-up": ({}, dict(micro_batch_size=1, global_batch_size=6, rampup_batch_size=[2, 2, 6])),
    "recomputed": ({}, full("uniform", 1)),
    "pre_exit": (BEFORE, {}),
    "filled": (dict(bubble_filling=dict(warmup=True, cooldown=True)), {}),
    "rotating": (dict(curriculum="rotational"), {}),
    "untied embeddings": ({}, UNTIED),
}
NEEDS_STAGES = {"pre_exit": 2, "filled": 3}

Choice = tuple[int, int, str, str, str]


def choices() -> list[Choice]:
    """Few choices in which every pair of values that can meet does, found greedily; always the same ones."""
    every = [
        choice
        for choice in product((1, 2, 3, 4), (1, 2), HEADS, OPTIMIZERS, SPECIAL)
        if choice[0] >= NEEDS_STAGES.get(choice[4], 1)
    ]
    missing = {pair for choice in every for pair in pairs_of(choice)}
    chosen = []
    while missing:
        best = max(every, key=lambda choice: (len(missing & pairs_of(choice)), -choice[0] * choice[1]))
        chosen.append(best)
        missing -= pairs_of(best)
    return chosen


def pairs_of(choice: Choice) -> set[tuple]:
    """Its pairs of values, each with its place."""
    return set(combinations(enumerate(choice), 2))


def case_of(choice: Choice) -> Case:
    """The run that a choice means."""
    _, _, head, optimizer, special = choice
    training, overrides = SPECIAL[special]
    return Case(section(HEADS[head], [2, 4, 6], **training), {**OPTIMIZERS[optimizer], **overrides})


def losses_of(
    prefixes: dict, folder: str, choices: list[Choice], resumes: bool, layout: Layout, **optim: Any
) -> dict[Choice, list[float]]:
    """The final exit's losses of each choice's run: of all steps, or of those since the checkpoint that it wrote.

    Args:
        prefixes: `data_prefix`.
        folder: of each run's checkpoints.
        choices: of one layout.
        resumes: go on from the runs' checkpoints; without it they are written.
        layout: of this job.
        **optim: further settings of the optimizer.
    """
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    found = {}
    for number, choice in enumerate(choices):
        case = case_of(choice)
        case.overrides["optim"] = {**case.overrides["optim"], **optim}
        settings = dict(limit_val_batches=0 if resumes else 1, val_check_interval=SAVED_AT)
        trainer = tuning_trainer(layout, STEPS, **settings, **half_precision(choice))
        if resumes:
            (trainer.ckpt_path,) = map(str, Path(folder, str(number)).rglob(f"*step={SAVED_AT}-*[0-9]"))
        else:
            resume_in(f"{folder}/{number}", trainer)
            trainer.checkpoint_callback.save_top_k = -1  # keep all
        model = Recorder()(pretraining_config(prefixes, case, layout), trainer)
        fill(model)
        model.first_weights.complete, model.keep_gradients = True, False
        trainer.fit(model)
        found[choice] = model.seen_losses
        destroy_num_microbatches_calculator()  # the next run's batches may have other sizes
    return found


def half_precision(choice: Choice) -> dict[str, Any]:
    """A trainer's settings for `megatron_amp_O2`, as NeMo's trainer builder makes them."""
    from nemo.collections.nlp.parts.nlp_overrides import (
        MegatronHalfPrecisionPlugin,
        PipelineMixedPrecisionPlugin,
    )

    if not choice[3].startswith("O2"):
        return {}
    plugin = PipelineMixedPrecisionPlugin if "distributed" in choice[3] else MegatronHalfPrecisionPlugin
    return dict(precision=None, plugins=[plugin("bf16-mixed", device="cpu")])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def test_every_pair_that_can_meet_does():
    found = set().union(*map(pairs_of, choices()))
    sizes = [4, 2, len(HEADS), len(OPTIMIZERS), len(SPECIAL)]
    of_two = sum(first * second for first, second in combinations(sizes, 2))
    cannot = sum(stages - 1 for stages in NEEDS_STAGES.values())
    assert len(found) == of_two - cannot and len(choices()) < 30


@pytest.mark.parametrize(
    "layout",
    [pytest.param(key, marks=pytest.mark.slow) if key in SLOW else key for key in LAYOUTS],
    ids=lambda key: "PP{} x TP{}".format(*key),
)
def test_resumed_runs_have_the_losses_of_whole_ones(layout, text, workers, tmp_path):
    mine = [choice for choice in choices() if choice[:2] == layout]
    resumed_is_whole(text, workers, tmp_path, mine, LAYOUTS[layout])


DISTRIBUTED = [(2, 1, "tied", name, "recomputed") for name in OPTIMIZERS if "distributed" in name]


@pytest.mark.parametrize(
    "layout",
    [pytest.param(Layout(dp=2), marks=pytest.mark.slow), Layout(dp=2, pp=2)],
    ids=["DP2", "DP2 x PP2"],
)
def test_shares_of_data_parallel_ranks_are_found_again(layout, text, workers, tmp_path):
    overlapped = dict(overlap_grad_sync=True, overlap_param_sync=True, ddp_bucket_size=1000)
    resumed_is_whole(text, workers, tmp_path, DISTRIBUTED, layout, **overlapped)


def resumed_is_whole(text, workers, tmp_path, choices: list[Choice], layout: Layout, **optim: Any) -> None:
    pool, folder = workers(layout.world_size), str(tmp_path)
    whole = pool.run(losses_of, text, folder, choices, False, layout, **optim)
    resumed = pool.run(losses_of, text, folder, choices, True, layout, **optim)
    for choice in choices:
        expected = whole[-1][choice]
        assert len(expected) == STEPS and len(set(expected)) == STEPS
        assert resumed[-1][choice] == expected[SAVED_AT:], choice


@pytest.mark.parametrize(
    "optimizer", ["distributed", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "O2"))]
)
def test_a_run_goes_on_in_another_layout(optimizer, text, workers, tmp_path):
    choice, layouts = (3, 1, "tied", optimizer, "rotating"), [LAYOUTS[3, 1], LAYOUTS[1, 1]]
    jobs = zip((False, True), layouts, strict=True)
    whole, resumed = (
        workers(layout.world_size).run(losses_of, text, str(tmp_path), [choice], resumes, layout)[-1][choice]
        for resumes, layout in jobs
    )
    rounding = 1e-6 if optimizer != "O2" else 1e-3  # sums in another order, in bfloat16
    assert resumed == pytest.approx(whole[SAVED_AT:], rel=rounding)
    assert resumed[-1] != pytest.approx(resumed[0], rel=0.05), "the second step learns"
