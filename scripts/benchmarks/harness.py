# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The one harness of all benchmarks: cases one by one, ways of a case in turn, results in JSONL that is taken up again.

A subject is a module with `OPTIONS` (option -> default, help, choices), `cases(arguments)`, `measure(case, arguments)`
and `page(rows)`; `AXES` names options that only say which cases there are. A row is a case: `case` (its keys),
`settings` (what all rows of a file share), `about` (where and when), and groups of what was measured, `ways` before
all: name -> metric -> a list with a value per repetition (None where it did not run), a number, a text, or {value,
low, high}.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from nemo_ee.files.output import write_text
from nemo_ee.report import provenance
from nemo_ee.runtime import stand_ins
from nemo_ee.runtime.script import user_errors

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # for tests/support, in this process and its ranks
REQUIRED = object()
"""Default of an option that has none."""
FILES = ("model", "adapter", "hf", "data", "text", "train", "validation")
"""Options of which settings keep only the file's name."""
NO_SETTINGS = ("output", "again", "work", "downloads", "only")
FEW, SECONDS, PATIENCE = 3, 20.0, 30.0
"""A way is timed in a few repetitions, and in more while its calls take less than so many seconds together; one whose
first call takes longer than its patience is left out."""


def main(subject: str) -> None:
    """Measures the cases that are missing (all with --again), each written when it is done, and then the page."""
    module = import_module(subject)
    parser = argparse.ArgumentParser(description=module.__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("results"), help="directory")
    parser.add_argument("--again", action="store_true", help="measure cases that have results, too")
    for name, (default, text, *choices) in module.OPTIONS.items():
        kind = {**_kind(default), "help": text, "choices": choices or None}
        parser.add_argument(f"--{name.replace('_', '-')}", **kind)
    arguments = parser.parse_args()
    ignored = (*NO_SETTINGS, *getattr(module, "AXES", ()))
    settings = {key: value for key, value in vars(arguments).items() if key not in ignored}
    settings |= {key: Path(settings[key] or "").name for key in FILES if key in settings}
    path = arguments.output / f"{subject}.jsonl"
    rows = load(path, settings)
    with user_errors(nemo=getattr(module, "NEMO", True)):
        from report import write_page

        for case in module.cases(arguments):
            if not arguments.again and any(row["case"] == case for row in rows):
                print(f"{name_of(case)}: done already", flush=True)
                continue
            print(f"{name_of(case)}: …", flush=True)
            begin = time.monotonic()
            found = module.measure(case, arguments)
            row = {"case": case, "settings": settings, **found, "about": about(begin)}
            rows = [each for each in rows if each["case"] != case] + [row]
            save(path, rows)
            print(f"{name_of(case)}: done in {row['about']['seconds']:.0f} s", flush=True)
        print(write_page(subject, arguments.output))


def _kind(default: Any) -> dict[str, Any]:
    """Of an option: lists are given as `1,4,16`, tuples as several words."""
    if isinstance(default, tuple):
        return {"nargs": "*", "default": list(default)}
    if isinstance(default, list):
        return {"type": lambda text: sorted(map(type(default[0]), text.split(","))), "default": default}
    if default is REQUIRED:
        return {"required": True}
    return {"type": str if default is None else type(default), "default": default}


def load(path: Path, settings: Mapping | None = None) -> list[dict]:
    """The rows so far; SystemExit if they were measured with other settings."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if settings is not None and any(row["settings"] != settings for row in rows):
        raise SystemExit(
            f"error: {path}: has results of other settings; choose another --output, or remove it"
        )
    return rows


def save(path: Path, rows: Iterable[dict]) -> None:
    """In one step: who stops the benchmark loses the case that is being measured."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def name_of(case: Mapping) -> str:
    """For people."""
    return (
        ", ".join(f"{key} {value}" for key, value in case.items()) if len(case) > 1 else str(*case.values())
    )


def about(begin: float) -> dict:
    """Where and when a case was measured that began then, by `time.monotonic`."""
    where = {"command": provenance.command(), "commit": provenance.commit(), "device": provenance.device()}
    where |= {"torch": torch.__version__, "load": provenance.load_average(), "date": provenance.date()}
    return where | {"seconds": time.monotonic() - begin}


def alternate(
    ways: Mapping[str, Callable[[int], Mapping[str, float]]],
    repeats: int,
    after: Callable[[int, Sequence[str]], None] = lambda repeat, names: None,
) -> tuple[dict[str, dict[str, list]], dict[str, str]]:
    """Runs all ways once to warm up, and then in turn, in an order that is drawn anew for each repetition.

    A way is called with the repetition, -1 while warming up, and returns what it measured. The first one runs in every
    repetition that any other runs in, since the others are compared with it. `after` is called with each repetition
    and its ways. Returns way -> metric -> a value per repetition, None where it did not run; and why ways were left
    out.
    """
    first, cost, left_out = next(iter(ways)), {}, {}
    for name, way in ways.items():
        try:
            cost[name] = seconds(lambda: way(-1))  # noqa: B023
        except NotImplementedError as error:
            left_out[name] = str(error)
            continue
        if cost[name] > PATIENCE and name != first:
            left_out[name] = f"its first call took {cost.pop(name):.0f} s"
    found: dict[str, dict[str, list]] = {name: {} for name in cost}
    for repeat in range(repeats):
        now = [name for name in cost if repeat < max(FEW, SECONDS / cost[name])]
        if now in ([], [first]) and len(cost) > 1:
            break
        now = list(dict.fromkeys([first, *now]))
        for name in random.Random(repeat).sample(now, len(now)):  # noqa: S311
            for metric, value in ways[name](repeat).items():
                values = found[name].setdefault(metric, [])
                values += [None] * (repeat - len(values)) + [value]
        after(repeat, now)
    return found, left_out


def synchronise() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any]) -> float:
    """That a call takes."""
    synchronise()
    begin = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - begin


def run_ranks(function: Callable, world: int, *arguments: Any) -> list[Any]:
    """Calls `function(*arguments)`, of a module's top level, in fresh processes that form one torch.distributed group:
    NCCL with a GPU each if there are GPUs, else gloo. Returns what each returned, in the order of ranks; raises torch's
    ChildFailedError if one raised or died."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    where = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": str(os.getpid())}
    how = LaunchConfig(1, 1, world, max_restarts=0, monitor_interval=0.5, start_method="spawn", **where)
    found = elastic_launch(how, _rank)(function, arguments)
    return [found[rank] for rank in range(world)]


def _rank(function: Callable, arguments: tuple) -> Any:
    stand_ins.enable()
    if gpu := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if gpu else "gloo")
    result = function(*arguments)
    torch.distributed.barrier()  # who leaves early breaks the connections of those still at work
    torch.distributed.destroy_process_group()
    return result
