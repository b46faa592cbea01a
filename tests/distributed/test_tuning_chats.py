# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Tuning on chats and prompts: the values of a plain computation line by line, in every parallel layout, resumed."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import test_tuning_resume
from tests.support import chats
from tests.support.tuning import Case, Layout, largest_difference, prepared, tune, tuning_trainer

LOSS_TOLERANCE, WEIGHT_TOLERANCE = 3e-6, 1e-7
PENALTY, MICRO, BATCH = 0.01, 2, 8
SHORTLIST = dict(mlp=False, norm=True, linear=True, projection="shortlist", shortlist_size=90)
MIX = dict(ce_weight=0.3, kl_weight=0.5, argmax_weight=0.2, loss_chunk_tokens=7)
EVERYTHING = dict(block=True, mlp=True, linear=True, projection="untied")
RIDGE = dict(init="ridge", ridge=dict(tokens=10_000, penalty=PENALTY))
LAYOUTS = {
    "SP x PP2": Layout(tp=2, pp=2, sp=True),
    "DP2": Layout(dp=2),
    "TP2": Layout(tp=2),
    "SP": Layout(tp=2, sp=True),
    "PP2": Layout(pp=2),
    "DP2 x PP2": Layout(dp=2, pp=2),
}
SLOW = {"TP2", "SP", "PP2", "DP2 x PP2"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("chats")
    return dict(
        chats=chats.write_chats(folder / "chats.jsonl"),
        more=chats.write_chats(folder / "more.jsonl", 5, seed=1),
        prompts=chats.write_prompts(folder / "prompts.jsonl"),
    )


def cases(files: dict[str, str]) -> dict[str, Case]:
    def case(head: dict, chat: bool, init: dict, **overrides: Any) -> Case:
        names = [files["chats"], files["more"]] if chat else [files["prompts"]]
        data = chats.data_section(names, names[:1], chat, shuffle=chat)
        section = dict(layers=[2, 6], head=head, tuning=MIX, **init)
        return Case(section, dict(data=data, **overrides), initialise=True, steps=3)

    return {
        "chats, closed form": case(SHORTLIST, True, RIDGE),
        "prompts, block": case(EVERYTHING, False, dict(init="random")),
        "all tokens": case(SHORTLIST, True, dict(init="random"), answer_only_loss=False),
    }


@pytest.fixture(scope="module")
def alone(files, workers):
    return workers(1).run(tune, {}, cases(files), Layout())[0]


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in LAYOUTS]
)
def test_a_layout_equals_one_process(layout, files, alone, workers):
    """Also DP2: a global batch has the same micro-batches, whose means are averaged, wherever they are computed."""
    chosen = cases(files)
    found = workers(LAYOUTS[layout].world_size).run(tune, {}, chosen, LAYOUTS[layout])
    for name in chosen:
        gaps = largest_difference([rank[name] for rank in found], alone[name])
        print(f"{layout}, {name}: {gaps}")
        assert gaps["train"] < LOSS_TOLERANCE and gaps["validation"] < LOSS_TOLERANCE, (name, gaps)
        assert gaps["initial"] < WEIGHT_TOLERANCE and gaps["final"] < WEIGHT_TOLERANCE, (name, gaps)


def first_step(case: Case) -> dict[str, Any]:
    """One step and one validation of one process, and the plain computation of both."""
    layout = Layout()
    trainer = tuning_trainer(layout, 1, limit_val_batches=2)
    model = prepared({}, case, layout, trainer, torch.float64)
    found: dict[str, Any] = {}
    training, validation = (model.cfg.data[name].file_names for name in ("train_ds", "validation_ds"))
    everything = not model.cfg.get("answer_only_loss", True)
    lines = [line for name in training for line in chats.samples_of(name, everything)]
    held_out = [line for name in validation for line in chats.samples_of(name, everything)]
    step = model.fwd_bwd_step

    def compared(iterator: Any, forward_only: bool, *args: Any) -> Any:
        if not forward_only:
            found["initial"] = {k: v.detach().clone() for k, v in model.gpt.exits.named_parameters()}
            found["closed form"] = [chats.run_alone(model.gpt, tokens) for tokens, *_ in lines]
            found["expected"] = chats.plain_step(model.gpt, lines[:BATCH], MICRO)
        loss = step(iterator, forward_only, *args)
        if not forward_only:
            found["loss"] = float(loss)
            found["gradients"] = {
                k: p.grad.clone() for k, p in model.gpt.exits.named_parameters() if p.requires_grad
            }
        return loss

    model.fwd_bwd_step = compared
    trainer.fit(model)
    found["expected validation"] = chats.plain_step(model.gpt, held_out, MICRO)[0]
    found["train"], found["validation"] = model.seen[True], model.seen[False]
    found["learnt"] = [learnt for *_, learnt in lines]
    found["shortlists"] = {
        n: head.projection.token_ids
        for n, head in model.gpt.exits.items()
        if "shortlist" in head.projection.kind
    }
    found["closed form"] = [(line.exits, line.final) for line in found["closed form"]]
    return found


@pytest.fixture(scope="module")
def steps(files, workers) -> dict[str, dict]:
    chosen = {}
    for name, case in cases(files).items():
        section = case.overrides["data"]
        chat = section["chat"]
        names = [files["chats"] if chat else files["prompts"]]
        data = chats.data_section(names, names, chat)
        chosen[name] = replace(case, overrides={**case.overrides, "data": data})
    return workers(1).run(first_steps, chosen)[0]


def first_steps(chosen: dict[str, Case]) -> dict[str, dict]:
    return {name: first_step(case) for name, case in chosen.items()}


NAMES = ("chats, closed form", "prompts, block", "all tokens")


@pytest.mark.parametrize("name", NAMES)
def test_losses_statistics_and_gradients_are_those_of_the_tokens_that_count(name, steps):
    found = steps[name]
    means, gradients = found["expected"]
    for n, values in means.items():
        assert found["train"][0][n] == pytest.approx(values, rel=1e-9)
        assert found["validation"][-1][n] == pytest.approx(found["expected validation"][n], rel=1e-9)
    assert found["loss"] == pytest.approx(sum(values[-1] for values in means.values()), rel=1e-6)
    assert gradients.keys() == found["gradients"].keys()
    for key, value in gradients.items():
        # A micro-batch's number of tokens divides the gradient in float32.
        torch.testing.assert_close(found["gradients"][key], value, rtol=1e-6, atol=1e-9)


def test_the_closed_form_is_the_least_squares_solution_on_the_answers(steps):
    found = steps["chats, closed form"]
    learnt = torch.cat(found["learnt"])
    assert 0.2 < learnt.double().mean() < 0.8, "answers are a part of the tokens"
    final = torch.cat([line[1] for line in found["closed form"]])[learnt]
    for n in (2, 6):
        hidden = torch.cat([line[0][n][:, 0] for line in found["closed form"]])[learnt]
        features = torch.nn.functional.rms_norm(hidden, (64,), eps=1e-5).numpy()
        ones = np.ones((len(features), 1))
        penalties = np.append(np.full(64, PENALTY * np.square(features).sum(0).mean()), 1e-6 * len(features))
        rows = np.vstack([np.hstack([features, ones]), np.diag(np.sqrt(penalties))])
        goal = np.vstack([final.numpy(), np.zeros((65, 64))])
        solution = np.linalg.lstsq(rows, goal, rcond=None)[0]
        fitted = [found["initial"][f"{n}.linear.weight"].T, found["initial"][f"{n}.linear.bias"][None]]
        np.testing.assert_allclose(torch.cat(fitted).numpy(), solution, rtol=1e-5, atol=1e-7)


def test_the_shortlist_has_what_is_said(steps, files):
    (kept, _) = steps["chats, closed form"]["shortlists"].values()
    said = torch.cat([labels[learnt] for _, labels, learnt in chats.samples_of(files["chats"])])
    counts = torch.bincount(said, minlength=chats.VOCABULARY)
    assert 0 < (counts > 0).sum() < len(kept), "there is room for more than what is said"
    assert set(torch.nonzero(counts)[:, 0].tolist()) <= set(kept.tolist())


@pytest.mark.parametrize("layout", [Layout(), pytest.param(Layout(pp=2), marks=pytest.mark.slow)])
def test_killed_and_resumed_is_uninterrupted(layout, files, workers, tmp_path, monkeypatch):
    case = replace(cases(files)["chats, closed form"], steps=test_tuning_resume.STEPS)
    monkeypatch.setitem(test_tuning_resume.CASES, "chats", (case, layout))
    test_tuning_resume.test_killed_and_resumed_is_uninterrupted("chats", {}, workers, tmp_path)
