# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Prints how many tuning steps fit into some minutes, from the step times that a short run logged.

python scripts/quickstart_steps.py LOG_DIRECTORY MINUTES
"""

import statistics
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEP_TIME = "train_step_timing in s"
LEAST = 20


def main(directory: str, minutes: str) -> None:
    """The median step time decides; a tenth of the minutes is left for validations."""
    times = []
    for file in Path(directory).rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        if STEP_TIME in events.Tags()["scalars"]:
            times += [event.value for event in events.Scalars(STEP_TIME)]
    if not times:
        sys.exit(f"error: {directory}: no step times were logged; delete the directory and run again")
    print(max(LEAST, round(float(minutes) * 60 * 0.9 / statistics.median(times))))


if __name__ == "__main__":
    main(*sys.argv[1:])
