# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The driver of check_gpu.sh: runs each part in a process of its own, then prints the table and writes the page.

It imports nothing but the standard library until all parts are done, so that missing packages, hanging parts
and crashes are reported in one line each.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from result import Result

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SECONDS = 480.0
"""For all parts together, unless told otherwise; the parts' own limits then change in proportion."""
PACKAGES = (
    *("torch", "nemo", "megatron", "lightning", "hydra", "omegaconf", "numpy", "transformers", "tokenizers"),
    *("ijson", "jieba", "opencc", "pangu", "rouge_score", "sacrebleu", "numba", "sentencepiece", "gguf"),
    *("matplotlib", "pytest"),
)
"""Modules that the parts import, most of them through NeMo."""


@dataclass(frozen=True)
class Part:
    """One part, a function `check` of the module of that name.

    Attributes:
        name: the module, see `part.py`.
        seconds: its time limit, the import of NeMo included.
    """

    name: str
    seconds: float


PARTS = (
    Part("found", 45),
    Part("marked_tests", 100),
    Part("tokens", 60),
    Part("tuning", 70),
    Part("speed", 190),
)
"""Their limits leave 15 seconds of the time for all; on a machine that is not busy they take less than half."""
GIVEN_MODEL = Part("given_model", 150)
"""Optional: only with --model. It has what the others leave of the time for all."""


@dataclass
class Outcome:
    """A part that has run, and for how many seconds."""

    part: Part
    result: Result
    seconds: float


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="check_gpu.sh", description="Checks nemo_ee on a GPU, offline.")
    parser.add_argument("--model", type=Path, help="measure this model as well: a .nemo or a .gguf file")
    parser.add_argument("--adapter", type=Path, help="its exits, a .nemo; without, untuned ones are made")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "benchmarks", help="directory of the page"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes; needs another --output")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts (default %(default)s)")
    names = [part.name for part in (*PARTS, GIVEN_MODEL)]
    parser.add_argument("--only", choices=names, action="append", help="this part alone; writes no page")
    arguments = parser.parse_args()
    for name in ("model", "adapter"):
        path = getattr(arguments, name)
        if path is not None and not path.is_file():
            parser.error(f"--{name} {path}: no such file")
    if arguments.seconds < 60:
        parser.error(
            f"--seconds {arguments.seconds:g}: must be at least 60; imports alone take that on a busy machine"
        )
    if GIVEN_MODEL.name in (arguments.only or ()) and not arguments.model:
        parser.error(f"--only {GIVEN_MODEL.name}: needs --model")
    if arguments.adapter and not arguments.model:
        parser.error("--adapter: needs --model, the base of these exits")
    if arguments.quick and arguments.output.resolve() == ROOT / "docs" / "benchmarks":
        parser.error(
            "--quick: figures of tiny shapes have no place in docs/benchmarks; give another --output"
        )
    return arguments


def environment() -> dict[str, str]:
    """Of the parts: offline, one GPU, and float32 that is float32 (NVIDIA's images turn TF32 on)."""
    mine = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NVIDIA_TF32_OVERRIDE": "0",
        "PYTHONUNBUFFERED": "1",
    }
    mine.setdefault("CUDA_VISIBLE_DEVICES", "0")
    mine.pop("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", None)
    return mine


def run(part: Part, arguments: argparse.Namespace, work: Path, seconds: float) -> Outcome:
    """Runs a part for at most so many seconds; whatever happens to it becomes a fault of its result."""
    path, log = work / f"{part.name}.json", work / f"{part.name}.log"
    command = [sys.executable, str(HERE / "part.py"), part.name, "--work", str(work)]
    command += ["--quick"] if arguments.quick else []
    if part is GIVEN_MODEL:
        command += ["--model", str(arguments.model.resolve())]
        command += ["--adapter", str(arguments.adapter.resolve())] if arguments.adapter else []
    begin, status = time.monotonic(), None
    print(f"{part.name}: at most {seconds:.0f} s …", flush=True)
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, cwd=ROOT, env=environment(), start_new_session=True
        )
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None or status != 0:  # a part's own processes do not outlive it
                _end(process)
    result = Result.read(path) if path.exists() else Result()
    if status is None:
        result.faults.append(f"was not done after {seconds:.0f} s; the end of its output: {_last(log)}")
    elif status != 0 and not result.faults:
        how = f"died of {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
        result.faults.append(f"{how}; the end of its output: {_last(log)}")
    elif not path.exists():
        result.faults.append("ended without a result")
    outcome = Outcome(part, result, time.monotonic() - begin)
    print(f"{part.name}: {'FAILED' if result.faults else 'passed'} in {outcome.seconds:.0f} s", flush=True)
    if result.faults:
        lines = log.read_text(errors="replace").splitlines()
        print("\n".join(f"    {line}" for line in lines[-40:]), flush=True)
    return outcome


def _end(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _last(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "nothing"


def main() -> int:
    """The exit status: 0 if all is well, 1 if a part failed, 2 if nothing could be checked."""
    arguments = parse_arguments()
    # Parts have process groups of their own, which hear nothing of what ends this process, as `timeout` does.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        print(
            f"error: {sys.executable} lacks {', '.join(missing)}: see scripts/requirements/requirements.txt",
            file=sys.stderr,
        )
        return 2

    parts = [*PARTS, *([GIVEN_MODEL] if arguments.model else [])]
    parts = [part for part in parts if not arguments.only or part.name in arguments.only]
    begin = time.monotonic()
    from nemo_ee.files.scratch import scratch_folder

    with scratch_folder("check_gpu") as work:
        outcomes = []
        for part in parts:
            left = arguments.seconds - (time.monotonic() - begin)
            limit = part.seconds * arguments.seconds / SECONDS
            outcomes.append(run(part, arguments, Path(work), max(1.0, min(limit, left))))
            if "no GPU" in outcomes[0].result.facts:
                print(f"error: {outcomes[0].result.facts['no GPU']}", file=sys.stderr)
                return 2
    return report(outcomes, arguments)


def report(outcomes: list[Outcome], arguments: argparse.Namespace) -> int:
    """Prints the table and writes the page; returns the exit status."""
    import page

    options = [f"--model {arguments.model.name}"] if arguments.model else []
    options += [f"--adapter {arguments.adapter.name}"] if arguments.adapter else []
    options += ["--quick"] if arguments.quick else []
    failed = {outcome.part.name: outcome.result.faults for outcome in outcomes if outcome.result.faults}
    print("\n" + page.table(outcomes) + "\n")
    if not arguments.only:
        try:
            print(f"wrote {page.write(outcomes, arguments.output, options)}")
        except Exception as error:  # a page that cannot be written hides nothing of what was found
            failed["page"] = [f"{type(error).__name__}: {error}"]
    for name, faults in failed.items():
        for fault in faults:
            print(f"failed: {name}: {fault}", file=sys.stderr)
    if not failed:
        print(f"all of {len(outcomes)} parts passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
