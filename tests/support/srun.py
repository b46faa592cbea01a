# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Stands for srun: starts the tasks of a job of one node on this machine, with the variables that SLURM gives to each.

It keeps its arguments in the file CALLS names. A task that a signal ends, or that fails, ends the others, as with
--kill-on-bad-exit. Where SIGNAL_AFTER names a file pattern, every task gets SIGTERM once such a file exists, as with
sbatch --signal=TERM@….
"""

import glob
import itertools
import os
import signal
import subprocess
import sys
import time


def main() -> int:
    """Returns srun's status: 0, or that of a task that failed."""
    with open(os.environ["CALLS"], "a") as calls:
        print("srun", *sys.argv[1:], sep="\n", file=calls)
    command = list(itertools.dropwhile(lambda word: word.startswith("--"), sys.argv[1:]))
    if os.environ.get("RUN_TASKS") != "1":
        return 0
    tasks = [
        subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)})
        for n in range(int(os.environ["SLURM_NTASKS"]))
    ]
    announced = os.environ.get("SIGNAL_AFTER")
    while any(task.poll() is None for task in tasks):
        failed = [task.returncode for task in tasks if task.returncode]
        if failed:
            for task in tasks:
                task.kill()
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if announced and glob.glob(announced):
            announced = None
            for task in tasks:
                task.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    return next((task.returncode for task in tasks if task.returncode), 0)


if __name__ == "__main__":
    sys.exit(main())
