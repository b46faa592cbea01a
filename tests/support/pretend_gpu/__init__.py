# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A GPU made of nothing: tensors say that they are on cuda:0, and the CPU computes.

What it shows: that no tensor is on the wrong device, which lines wait for the device, and that the code which runs
on a GPU alone gives the CPU's results. What it cannot show: kernels, streams, memory, speed.

It changes torch for a whole process, so it has processes of its own:

    python -m tests.support.pretend_gpu [--gpus N] scripts/megatron_gpt_ee_generate.py …

runs a script, and whatever Python that starts; `environment(gpus)` makes any command do so (a shell script, torchrun);
`pretend_gpus(n).run(fn, …)`, a fixture like `workers`, calls a function in n ranks.

- `tensor`: the tensor, and what may mix with it; `rules`: which operations mix or wait.
- `waits`: the counter.
- `torch_api`, `cuda_api`, `collectives`: torch's ways to the device, `torch.cuda`, and NCCL (gloo answers).
- `pool`: ranks that have NeMo imported.
"""

import os
import sys
from pathlib import Path

GPUS = "NEMO_EE_TEST_PRETEND_GPUS"
"""The environment variable that gives a process as many pretend GPUs, when it imports torch."""

ROOT = Path(__file__).resolve().parents[3]


def environment(gpus: int = 1) -> dict[str, str]:
    """The environment of a command whose Python processes have pretend GPUs."""
    path = [str(Path(__file__).parent / "site"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        GPUS: str(gpus),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def enable(gpus: int = 1) -> None:
    """Gives this process pretend GPUs. It must not have imported what asks torch for GPUs; later calls do nothing."""
    import torch

    from tests.support.pretend_gpu import collectives, cuda_api, torch_api

    if getattr(torch.cuda, "_pretend", False):
        return
    torch_api.patch()
    cuda_api.patch(gpus)
    collectives.patch()
    torch.cuda._pretend = True


def enable_with_torch() -> None:
    """Has `import torch` call `enable`, if the environment asks for it and does not hide all GPUs."""
    gpus = int(os.environ.get(GPUS, "0"))
    if gpus and os.environ.get("CUDA_VISIBLE_DEVICES") != "-1" and "torch" not in sys.modules:
        from tests.support.pretend_gpu.importing import EnablingFinder

        sys.meta_path.insert(0, EnablingFinder(gpus))
