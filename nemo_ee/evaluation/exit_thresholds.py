# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""One threshold per exit in use, of what an evaluation's settings say: a number, one per exit, or the checkpoint's."""

from dataclasses import dataclass

from nemo_ee.config import EarlyExitConfig, check_thresholds
from nemo_ee.decoding.leaving import NEVER
from nemo_ee.errors import Fault
from nemo_ee.evaluation.settings import CALIBRATED, SweepConfig, Threshold
from nemo_ee.evaluation.teacher_forced import CONFIDENCE_RULE


@dataclass(frozen=True)
class ExitThresholds:
    """Thresholds with a name for people.

    Attributes:
        name: as a report has it.
        values: one per exit in use.
    """

    name: str
    values: tuple[float, ...]


def resolved_thresholds(
    sweep: SweepConfig, early_exit: EarlyExitConfig, faults: list[Fault]
) -> dict[Threshold, ExitThresholds]:
    """What each of `sweep.thresholds` stands for; appends to `faults` what does not fit the checkpoint.

    Args:
        sweep: of the evaluation.
        early_exit: the checkpoint's.
        faults: receives what is wrong.
    """
    exits, found = sweep.exits or early_exit.layers, {}
    for each in sweep.thresholds:
        if isinstance(each, str):
            values = _calibrated(early_exit, exits, faults)
            found[each] = ExitThresholds(f"{CALIBRATED} ({_listed(values)})", values)
        elif isinstance(each, tuple):
            faults += check_thresholds(each, len(exits), "generation.thresholds")
            found[each] = ExitThresholds(_listed(each), each)
        else:
            found[each] = ExitThresholds(f"{each:g}", (each,) * len(exits))
    return found


def _calibrated(
    early_exit: EarlyExitConfig, exits: tuple[int, ...], faults: list[Fault]
) -> tuple[float, ...]:
    """The checkpoint's thresholds of these exits; those that it does not use are not asked."""
    inference = early_exit.inference
    known = inference.known_threshold
    if known is None:
        rule = "the checkpoint was never calibrated, so that it has no thresholds"
        remedy = "calibrate it (scripts/calibrate_early_exit.py), or give numbers"
        faults.append(Fault("generation.thresholds", CALIBRATED, rule, remedy))
        return ()
    if inference.confidence != CONFIDENCE_RULE:
        rule = f"the checkpoint's are of confidence={inference.confidence}, and text is scored by {CONFIDENCE_RULE}"
        faults.append(Fault("generation.thresholds", CALIBRATED, rule, "give numbers"))
    usual = early_exit.layers if inference.exits is None else inference.exits
    own = known if isinstance(known, tuple) else (known,) * len(usual)
    by_layer = dict(zip(usual, own, strict=True))
    return tuple(by_layer.get(n, NEVER) for n in exits)


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
