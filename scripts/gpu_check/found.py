# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What a machine has: its GPU, the driver, the packages; and which code is checked."""

import hashlib
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from result import Result

import nemo_ee
from nemo_ee.report import provenance

if TYPE_CHECKING:
    from part import Settings

PACKAGES = {
    "Apex": "apex",
    "Transformer Engine": "transformer_engine",
    "megatron-core": "megatron-core",
    "nemo": "nemo-toolkit",
    "lightning": "lightning",
    "transformers": "transformers",
}


def check(settings: "Settings", result: Result) -> None:
    """Fills the facts; each is a row of the table, too."""
    properties = torch.cuda.get_device_properties(0)
    result.facts |= {
        "GPU": f"{torch.cuda.get_device_name()}, {properties.total_memory / 2**30:.1f} GiB, "
        f"compute capability {properties.major}.{properties.minor}",
        "driver": driver(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        **{name: version(package) for name, package in PACKAGES.items()},
        "Python": f"{platform.python_version()}, {os.cpu_count()} cores",
        "nemo_ee": f"{nemo_ee.__version__}, commit {provenance.commit()}, source {source_hash()}",
        "date": provenance.date(),
    }
    if is_pretended():
        result.facts["pretend"] = "yes"
    result.lines += [(name, value) for name, value in result.facts.items() if name != "pretend"]


def is_pretended() -> bool:
    """Whether the "GPU" is the tests' stand-in, whose tensors are of a class of their own."""
    return type(torch.empty(0, device="cuda")) is not torch.Tensor


def driver() -> str:
    """NVIDIA's, by nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return "unknown (no nvidia-smi)"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else "unknown"


def version(package: str) -> str:
    """Of an installed package; `none` where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def source_hash() -> str:
    """Of all files of the package and the scripts, so that copies without git can be told apart.

    Twelve digits of the sha256 over names and contents, in order of names.
    """
    root, digest = Path(nemo_ee.__file__).resolve().parents[1], hashlib.sha256()
    files = [path for folder in ("nemo_ee", "scripts") for path in (root / folder).rglob("*")]
    for path in sorted(path for path in files if path.suffix in (".py", ".sh")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
