# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The times of training steps, read back from TensorBoard logs."""

from pathlib import Path

from nemo_ee.errors import DataError

_STEP_TIME = "train_step_timing in s"
"""NeMo's name."""


def read_step_times(log_directory: str | Path, key: str = "log_directory") -> tuple[float, ...]:
    """Seconds of each step whose time was logged (NeMo logs one step in `trainer.log_every_n_steps`).

    Args:
        log_directory: searched recursively for event files.
        key: what the user sets to it.

    Raises:
        DataError: no times were logged.
    """
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    times: list[float] = []
    for file in sorted(Path(log_directory).rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={SCALARS: 0}).Reload()
        if _STEP_TIME in events.Tags()[SCALARS]:
            times += [event.value for event in events.Scalars(_STEP_TIME)]
    if not times:
        raise DataError(
            f"{key}={log_directory}: no step times were logged; delete the directory and run again"
        )
    return tuple(times)
