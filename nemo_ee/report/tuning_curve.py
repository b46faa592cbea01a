# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The per-exit validation curve of a tuning run, read back from its TensorBoard logs."""

import re
from collections.abc import Iterator
from pathlib import Path

from nemo_ee.errors import DataError
from nemo_ee.report.schema import CurvePoint

_SCALAR = re.compile(r"val_(loss|agreement|confidence)/(?:exit_(\d+)|(final))")
_TOKENS = "consumed_tokens"


def read_tuning_curve(log_directory: str | Path, key: str = "log_directory") -> tuple[CurvePoint, ...]:
    """Reads ``val_loss/exit_N``, ``val_agreement/exit_N``, ``val_confidence/exit_N`` and ``val_loss/final``.

    A resumed run leaves several event files, which NeMo's exp_manager moves into ``run_0``, ``run_1`` and so
    on below the log directory. All are read; where two logged the same step, the later one counts.

    Args:
        log_directory: searched recursively for event files.
        key: what the user sets to it.

    Returns:
        Points in ascending order of step, then of exit layer, the final exit last. ``tokens`` is the last
        ``consumed_tokens`` logged at or before the step, None if there is none.

    Raises:
        DataError: the directory does not exist or has no event files.
    """
    files = sorted(Path(log_directory).rglob("events.out.tfevents.*"))
    if not files:
        raise DataError(f"{key}={log_directory}: must hold TensorBoard event files; check the path")
    loaded = [scalars for file in files if (scalars := _read_scalars(file))]
    loaded.sort(
        key=lambda scalars: min(wall_time for events in scalars.values() for wall_time, _, _ in events)
    )
    merged: dict[tuple[str, int], float] = {}
    for scalars in loaded:
        for tag, events in scalars.items():
            merged.update({(tag, step): value for _, step, value in events})
    return tuple(_points(merged))


def _read_scalars(file: Path) -> dict[str, list[tuple[float, int, float]]]:
    """Wall time, step and value of every scalar that belongs to the curve."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    accumulator = EventAccumulator(str(file), size_guidance={SCALARS: 0})
    accumulator.Reload()
    tags = [tag for tag in accumulator.Tags()[SCALARS] if tag == _TOKENS or _SCALAR.fullmatch(tag)]
    return {
        tag: [(event.wall_time, event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in tags
    }


def _points(merged: dict[tuple[str, int], float]) -> Iterator[CurvePoint]:
    measured: dict[tuple[int, int | None], dict[str, float]] = {}
    for (tag, step), value in merged.items():
        if match := _SCALAR.fullmatch(tag):
            layer = int(match[2]) if match[2] else None
            measured.setdefault((step, layer), {})[match[1]] = value
    token_steps = sorted(step for tag, step in merged if tag == _TOKENS)
    for step, layer in sorted(measured, key=lambda key: (key[0], key[1] is None, key[1])):
        values = measured[step, layer]
        if "loss" not in values:
            continue
        before = [each for each in token_steps if each <= step]
        tokens = int(merged[_TOKENS, before[-1]]) if before else None
        yield CurvePoint(
            step, layer, values["loss"], tokens, values.get("agreement"), values.get("confidence")
        )
