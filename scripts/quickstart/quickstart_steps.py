# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Prints how many training steps fit into some minutes, from the step times that short runs logged.

python scripts/quickstart/quickstart_steps.py LOG_DIRECTORY... MINUTES

With several directories, one per run to come, it is the number of steps of each run if all have to fit.
"""

import statistics
import sys

from nemo_ee.errors import DataError
from nemo_ee.report.step_times import read_step_times

LEAST = 20


def main(*arguments: str) -> None:
    """Median step times decide; a tenth of the minutes is left for validations."""
    *directories, minutes = arguments
    try:
        seconds = sum(statistics.median(read_step_times(name)) for name in directories)
    except DataError as error:
        sys.exit(f"error: {error}")
    print(max(LEAST, round(float(minutes) * 60 * 0.9 / seconds)))


if __name__ == "__main__":
    main(*sys.argv[1:])
