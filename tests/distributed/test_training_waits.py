# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""While a step is trained, nothing makes the host wait for a GPU between its first forward and last backward."""

from typing import Any

import pytest
import torch

from tests.distributed.test_pretraining_parallel import section
from tests.support import pretraining, tuning
from tests.support.device_waits import DeviceWaits, of_steps
from tests.support.tiny_gpt import HEADS, fill
from tests.support.tuning import Layout, tuning_trainer, write_text

MIXED = dict(ce_weight=0.3, kl_weight=0.5, argmax_weight=0.2, token_weighting="confidence")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def planted() -> list[str]:
    """Waits of every kind, in a forward and in a backward pass, between others that are none."""

    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            float(gradient.sum())
            return gradient

    x, mask, rows = torch.ones(3, 4, requires_grad=True), torch.eye(4)[:3] > 0, torch.tensor([0, 2])
    seen = DeviceWaits()
    with seen.watching():
        x.sum().item()  # before it starts
        seen.start()
        y = x.detach().clone()
        y[mask] = 0.0  # fills
        y[:, 1] = 0.0
        y.index_fill_(0, rows, 1.0)
        y[rows] = y[rows] + torch.where(mask, 1.0, 0.0)[rows]
        assert not seen.found
        y[mask]
        y[rows] = 0.0
        y[0, 1] = 1.0
        y[mask] = torch.ones(3)
        y.tolist()
        if y.sum() > 0:
            torch.tensor(1.0, device="cpu")
        str(y), f"{y[0, 0]}", y.equal(y), y.nonzero(), y.unique(), y.cpu().numpy()
        seen.mark()
        Reads.apply(x).sum().backward()
    assert len(seen.between()) < len(seen.found), seen
    assert all("test_training_waits.py" in one for one in seen.found)
    return [one.split(" at ")[0] for one in seen.found]


def test_waits_are_found():
    found = planted()
    assert [*dict.fromkeys(found)] == [
        "index by a mask",
        "index_put_ from the host",
        "an element set from the host",
        "index_put_ by a mask",
        "tolist",
        "_local_scalar_dense",
        "tensor from the host",
        "__repr__",
        "__format__",
        "equal",
        "nonzero",
        "_unique2",
        "cpu",
        "numpy",
    ]
    assert found[-1] == "_local_scalar_dense", "of the backward pass"


def waits_of(model: Any, trainer: Any) -> list[str]:
    """What waits in a step of training."""
    fill(model)
    model.exits_initialised, model.keep_gradients = True, False
    trainer.fit(model)
    (found,) = model.waits
    return found


def trained(prefixes: dict, cases: dict[str, Any], layout: Layout) -> dict[str, list[str]]:
    """What waits in one step of each case; every step is logged."""
    found = {}
    for name, case in cases.items():
        trainer = tuning_trainer(layout, 1, limit_val_batches=0)
        if isinstance(case, tuning.Case):
            kind, config = tuning.recorder(), tuning.tuning_config(prefixes, case, layout)
        else:
            kind, config = pretraining.Recorder(), pretraining.pretraining_config(prefixes, case, layout)
        found[name] = waits_of(of_steps(kind)(config, trainer), trainer)
    return found


def cases() -> dict[str, Any]:
    """Every head, tuned by all terms at once and trained with its backbone; layers that are dropped."""
    made: dict[str, Any] = {}
    for name, head in HEADS.items():
        head = {**head, "train_projection": head["projection"] != "tied"}
        chosen = dict(layers=[2, 8], init="random", head=head, tuning=MIXED)
        made[f"tuning | {name}"] = tuning.Case(chosen)
        made[f"pretraining | {name}"] = pretraining.Case(section(name, [2, 6]))
    only, head = dict(ce_weight=1.0, kl_weight=0.0, argmax_weight=0.0), HEADS["linear, shortlist"]
    made["tuning | truncated"] = tuning.Case(dict(layers=[2, 6], init="random", head=head, tuning=only))
    more = dict(token_weighting="confidence", layer_dropout=dict(max_rate=0.5))
    made["pretraining | norm, tied"] = pretraining.Case(section("norm, tied", [2, 4, 6], **more))
    return made


CASES = cases()
LAYOUTS = {
    "one process": (Layout(), tuple(CASES)),
    "TP2": (Layout(tp=2), ("tuning | linear, shortlist", "pretraining | MLP, untied")),
    "PP2": (Layout(pp=2), ("tuning | MLP, untied", "pretraining | norm, tied")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_waits_for_nothing(name, text, workers):
    layout, chosen = LAYOUTS[name]
    for rank in workers(layout.world_size).run(trained, text, {case: CASES[case] for case in chosen}, layout):
        assert rank == {case: [] for case in chosen}
