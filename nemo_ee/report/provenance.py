# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Where and with what numbers were measured."""

import datetime
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from nemo_ee import __version__
from nemo_ee.report.schema import Metadata
from nemo_ee.runtime.commands import IN_A_WHEEL, as_installed

_ROOT = Path(__file__).resolve().parents[2]


def commit() -> str:
    """The commit of this package's working tree, with `-dirty` where its code differs; else `unknown`.

    A package that was installed from a wheel is a release, whatever repository its environment lies in.
    """
    if IN_A_WHEEL:
        return f"release {__version__}"
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # no git, or a copy of a clone


def device() -> str:
    """The accelerator, or the processor with its cores and the threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.partition(":")[2]
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0].strip() if names else model
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def load_average() -> str:
    """Processes that wanted to run in the last minute; timings under load are worth less."""
    return f"{os.getloadavg()[0]:.1f}"


def metadata(config: Any, model: Any) -> Metadata:
    """Where an evaluation's or a calibration's numbers come from.

    Args:
        config: its settings: the model's files, and the seed.
        model: restored from these.
    """
    return Metadata(
        model=Path(config.gpt_model_file).name,
        num_layers=model.cfg.num_layers,
        adapter=None if config.adapter_file is None else Path(config.adapter_file).name,
        commit=commit(),
        device=f"{device()}, load average {load_average()}",
        torch_version=torch.__version__,
        dtype=str(model.torch_dtype).removeprefix("torch."),
        seed=config.seed,
        date=date(),
        command=command(),
    )


def date() -> str:
    """Now, UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def command() -> str:
    """The command line of this process; absolute paths outside the clone are shown by name alone."""
    return as_installed(shlex.join(["python", *(_shortened(argument) for argument in sys.argv)]))


def _shortened(argument: str) -> str:
    key, equals, value = argument.rpartition("=")
    if os.path.isabs(value):
        path = Path(value).resolve()
        value = str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else path.name
    return f"{key}{equals}{value}"
