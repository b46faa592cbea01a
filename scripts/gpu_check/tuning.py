# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""50 tuning steps of a tiny model in float32, closed form first, held to the CPU's losses."""

import math
from typing import TYPE_CHECKING, Any

import tiny
from result import Result

from tests.support.tiny_gpt import fill
from tests.support.tuning import Case, Layout, recorder, trainer_settings, tuning_config, write_text

if TYPE_CHECKING:
    from part import Settings

STEPS, QUICK_STEPS = 50, 4
TOLERANCE = 5e-4
"""Of a loss, relative. Devices sum in other orders, which is some 1e-6 in float32. A change of 1e-5 in all weights,
ten times as much, moves losses by 8e-5 within these steps (seen on a CPU); TF32's would by more than is allowed."""
FINAL = "0"
"""What stands for the final exit among exit layers."""
EARLY_EXIT = {
    "layers": [2, 4, 6],
    "init": "ridge",
    "head": {"shortlist_size": 100},
    "tuning": {"ce_weight": 0.25, "kl_weight": 0.5, "argmax_weight": 0.25},
    "ridge": {"tokens": 256},
}
COLUMNS = ("loss", "divergence")


def reference(settings: "Settings") -> dict[str, Any]:
    """`steps`: per step, exit -> loss and divergence in nats per token, on the device of this process; `optimizer`."""
    return tuned(settings, "reference")


def check(settings: "Settings", result: Result) -> None:
    """The device's run, and the CPU's beside it in another process."""
    wait = settings.start_reference("tuning")
    found = tuned(settings, "device")
    compare(found["steps"], wait()["steps"], result)
    fused = found["optimizer"].endswith(", fused")
    result.expect(fused, "optimizer", found["optimizer"], "many small kernels instead of torch's fused one")


def tuned(settings: "Settings", name: str) -> dict[str, Any]:
    """See `reference`; `name` is that of a folder of its own."""
    folder, steps = settings.work / f"tuning_{name}", QUICK_STEPS if settings.quick else STEPS
    folder.mkdir()
    case = Case(EARLY_EXIT)
    trainer = tiny.trainer(**trainer_settings(steps))
    model = recorder()(tuning_config(write_text(folder), case, Layout()), trainer)
    fill(model)
    model.first_weights.complete = False  # the closed form comes after the backbone's weights
    trainer.fit(model)
    steps = [
        {str(n): [float(value) for value in row[:2]] for n, row in step.items()} for step in model.seen[True]
    ]
    optimizer = model.optimizers(use_pl_optimizer=False)
    fused = "fused" if optimizer.param_groups[0].get("fused") else "not fused"
    return {"steps": steps, "optimizer": f"{type(optimizer).__name__}, {fused}"}


def compare(found: list[dict], expected: list[dict], result: Result) -> None:
    """One row per exit."""
    if len(found) != len(expected):
        result.faults.append(f"{len(found)} steps were logged instead of the CPU's {len(expected)}")
        return
    for n in expected[0]:
        worst, where = 0.0, ""
        for step, (mine, other) in enumerate(zip(found, expected, strict=True), start=1):
            for name, a, b in zip(COLUMNS, mine[n], other[n], strict=True):
                difference = relative(a, b)
                if difference >= worst:
                    worst, where = difference, f"step {step}: {name} {a:.6f} instead of the CPU's {b:.6f}"
        first, last = expected[0][n][0], expected[-1][n][0]
        summary = f"loss {first:.3f} to {last:.3f}, within {worst:.1g} of the CPU's (allowed {TOLERANCE:g})"
        name = "final exit" if n == FINAL else f"exit {n}"
        result.expect(worst <= TOLERANCE, f"{len(expected)} tuning steps, {name}", summary, where)


def relative(a: Any, b: Any) -> float:
    """Difference relative to the second; infinite for what is no number."""
    difference = abs(a - b) / max(abs(b), 1e-2)
    return difference if math.isfinite(difference) else math.inf
