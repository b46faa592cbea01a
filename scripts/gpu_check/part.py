# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The process of one part of check_gpu.sh: calls `check` of the part's module and writes its result as JSON.

    python scripts/gpu_check/part.py NAME --work DIR [--quick]

With --reference it is the part's reference on the CPU instead, which `Settings.start_reference` starts.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from result import Result  # noqa: E402

from nemo_ee.files.output import write_text
from nemo_ee.runtime.script import user_errors  # noqa: E402

WITHOUT_NEMO = ("found", "marked_tests")
"""Parts that need not import it in this process."""
NO_GPU = {"CUDA_VISIBLE_DEVICES": "-1"}
"""Of the environment of a process that is to see none."""


@dataclass(frozen=True)
class Settings:
    """Of a part.

    Attributes:
        work: a directory for its files.
        quick: tiny shapes and few repetitions.
        model: of `given_model`.
        adapter: likewise.
    """

    work: Path
    quick: bool = False
    model: Path | None = None
    adapter: Path | None = None

    def start_reference(self, name: str) -> Callable[[], Any]:
        """Computes the reference of a part on the CPU, in a process that sees no GPU and uses torch alone.

        Returns:
            What waits for it, and returns what that module's `reference` did. It raises RuntimeError if there
            is none.
        """
        path = self.work / f"{name}_reference.json"
        command = [sys.executable, __file__, name, "--work", str(self.work), "--reference", str(path)]
        command += ["--quick"] if self.quick else []
        alone = {**os.environ, **NO_GPU, "NEMO_EE_CPU_KERNELS": "0"}
        log = path.with_suffix(".log")
        with log.open("w") as stream:
            process = subprocess.Popen(command, env=alone, stdout=stream, stderr=stream)

        def wait() -> Any:
            if (status := process.wait()) != 0:
                print(log.read_text(errors="replace"))
                raise RuntimeError(f"the reference on the CPU ended with {status}; see above")
            return json.loads(path.read_text())

        return wait


def no_gpu(version: str, cuda: str | None) -> str:
    """What to say where torch, of that version and built for that CUDA, sees no GPU."""
    remedy = (
        "nvidia-smi must list one, CUDA_VISIBLE_DEVICES must not hide it, and its driver must be new enough"
    )
    if cuda is None:
        remedy = f"it was built without CUDA; install a build with it into {sys.prefix}"
    return f"torch {version} sees no GPU, so there is nothing to check: {remedy}"


def run(name: str, settings: Settings) -> Result:
    """The part's result; what it raises is a fault."""
    result = Result()
    try:
        with user_errors(nemo=name not in WITHOUT_NEMO):
            import torch

            if not torch.cuda.is_available():
                result.facts["no GPU"] = no_gpu(torch.__version__, torch.version.cuda)
                raise SystemExit(result.facts["no GPU"])
            torch.set_float32_matmul_precision("highest")
            importlib.import_module(name).check(settings, result)
    except SystemExit as error:
        result.faults.append(str(error))
    except Exception as error:  # of whatever is wrong on this machine
        traceback.print_exc()
        result.faults.append(f"{type(error).__name__}: {error}")
    return result


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--reference", type=Path)
    arguments = parser.parse_args()
    settings = Settings(arguments.work, arguments.quick, arguments.model, arguments.adapter)
    if arguments.reference is not None:
        with user_errors():
            found = importlib.import_module(arguments.name).reference(settings)
            write_text(arguments.reference, json.dumps(found))
        return 0
    result = run(arguments.name, settings)
    result.write(arguments.work / f"{arguments.name}.json")
    return 1 if result.faults else 0


if __name__ == "__main__":
    sys.exit(main())
