# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What training exits along costs: a GPT's step with exits against the same step without.

    python scripts/benchmarks/training_overhead.py                           # all cases
    python scripts/benchmarks/training_overhead.py --cases pp4-minimal       # one
    python scripts/benchmarks/training_overhead.py --quick --output smoke    # a smoke test

One model per case, stepped with exits and without in turn, through Megatron's own schedule: the same weights,
the same batches. `minimal` exits are a norm and a projection of their own, `mlp` exits have an MLP before
them. Starts a process per pipeline stage: gloo on a CPU, NCCL with a GPU per stage otherwise; cases that need
more GPUs than there are get left out. Results go to OUTPUT/training_overhead.json case by case; started
again, the script does those that are missing (all with --again), then writes OUTPUT/training_overhead.md and
.png.
"""

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch
from overhead_report import write_page
from overhead_stage import EXITS, PLAIN, Found, Job, measure
from pipeline_costs import Size, predict
from rank_processes import RankError, run_ranks

from nemo_ee.evaluation import provenance
from nemo_ee.files.output import write_text
from nemo_ee.runtime.script import user_errors

CASES = {f"pp{p}-{head}": (p, head == "mlp") for p in (1, 2, 4) for head in ("minimal", "mlp")}
SMALL = dict(layers=4, hidden=64, heads=4, vocabulary=512, sequence=32, exits=(1, 2))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of either kind; one more warms up")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=8, help="of a step")
    parser.add_argument("--precision", choices=("32", "bf16"), help="default: bf16 on a GPU, else 32")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds of a case")
    parser.add_argument("--again", action="store_true", help="measure cases that have results, too")
    parser.add_argument("--quick", action="store_true", help="a smoke test: a tiny model, two steps")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"), help="directory")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.micro_batches = 2, 4
    unknown = set(arguments.cases.split(",")) - set(CASES)
    if unknown:
        parser.error(f"--cases: {', '.join(sorted(unknown))}: unknown; use {', '.join(CASES)}")
    return arguments


def run_case(name: str, arguments: argparse.Namespace) -> dict:
    """Measures one case; returns its row of the results."""
    stages, mlp = CASES[name]
    gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    size = Size(
        micro_batch=arguments.micro_batch,
        micro_batches=arguments.micro_batches,
        **(SMALL if arguments.quick else {}),
    )
    threads = 1 if arguments.quick else max(1, cores // stages)
    bf16 = (arguments.precision or ("bf16" if gpus else "32")) == "bf16"
    job = Job(size, stages, mlp, arguments.steps, threads, bf16)
    workers = stages if gpus else cores // threads
    backend, begin = "nccl" if gpus else "gloo", time.monotonic()
    ranks: list[Found] = run_ranks(measure, stages, job, backend=backend, timeout=arguments.timeout)
    return {
        "name": name,
        "settings": settings(arguments),
        "stages": stages,
        "mlp": mlp,
        "size": asdict(size),
        "bf16": bf16,
        "threads": threads,
        "workers": workers,
        "prediction": asdict(predict(size, stages, mlp, workers)),
        "schedule": {kind: slowest([rank.schedule[kind] for rank in ranks]) for kind in (PLAIN, EXITS)},
        "step": {kind: slowest([rank.step[kind] for rank in ranks]) for kind in (PLAIN, EXITS)},
        "memory": [
            {
                PLAIN: rank.peak[PLAIN],
                EXITS: rank.peak[EXITS],
                "exit_gradients": rank.exit_gradients,
                "exits_here": rank.exits,
            }
            for rank in ranks
        ],
        "losses": {key: value for rank in ranks for key, value in rank.losses.items()},
        "seconds": time.monotonic() - begin,
        "command": provenance.command(),
        "commit": provenance.commit(),
        "device": provenance.device() if gpus else provenance.device().rpartition(", ")[0],
        "load": provenance.load_average(),
        "date": provenance.date(),
    }


def slowest(ranks: list[list[float]]) -> list[float]:
    """Seconds of every step, which begins on all stages at one time and ends with the last one."""
    return [max(each) for each in zip(*ranks, strict=True)]


def settings(arguments: argparse.Namespace) -> list:
    """What results must have in common to stand in one table."""
    kind = arguments.precision or ("bf16" if torch.cuda.is_available() else "32")
    return [arguments.quick, arguments.micro_batch, arguments.micro_batches, kind]


def load(path: Path, arguments: argparse.Namespace) -> list[dict]:
    """The results so far.

    Raises:
        SystemExit: they were measured with other settings.
    """
    rows = json.loads(path.read_text()) if path.exists() else []
    if any(row["settings"] != settings(arguments) for row in rows):
        raise SystemExit(
            f"error: {path}: has results of other settings; choose another --output, or remove it"
        )
    return rows


def save(path: Path, rows: list[dict]) -> None:
    write_text(path, json.dumps(rows, indent=1) + "\n")


def main() -> None:
    arguments = parse_arguments()
    path = arguments.output / "training_overhead.json"
    with user_errors(nemo=False):
        rows, failed = load(path, arguments), []
        for name in arguments.cases.split(","):
            if any(row["name"] == name for row in rows) and not arguments.again:
                print(f"{name}: has results already", flush=True)
                continue
            if 0 < torch.cuda.device_count() < CASES[name][0]:
                print(f"{name}: left out, it needs {CASES[name][0]} GPUs", flush=True)
                continue
            try:
                row = run_case(name, arguments)
            except RankError as error:
                print(f"{name}: failed\n{error}", flush=True)
                failed.append(name)
                continue
            rows = [each for each in rows if each["name"] != name] + [row]
            save(path, rows)
            print(f"{name}: done in {row['seconds']:.0f} s", flush=True)
        if rows:
            print(write_page(sorted(rows, key=lambda row: list(CASES).index(row["name"])), arguments.output))
        if failed:
            raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
