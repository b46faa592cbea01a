# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Runs NeMo's Megatron GPT stack where CUDA, Apex or Transformer Engine is absent: supplies what is missing.

`enable` applies the changes listed in `cuda_stand_ins`, where there is no CUDA, in `compiler_stand_ins`, where
torch.compile cannot work, and in `apex_stand_ins`, where there is no Apex. For each they name the upstream symbol, the
release it was checked against, why it is changed, and what replaces it. Without Transformer Engine nothing is missing:
megatron-core has layers of its own. What is changed although it is there: :mod:`nemo_ee.runtime.upstream`.

1. Symbols of torch are replaced at once.
2. Symbols of Lightning, Megatron and NeMo are replaced right after the module that defines them has been
   executed, by an import hook. `enable` itself therefore imports torch and nothing else, and code that
   imports *from* a patched module sees the replacement.
"""

import importlib
import os
import sys

from nemo_ee.runtime import apex_stand_ins, compiler_stand_ins, cuda_stand_ins
from nemo_ee.runtime.patching import PatchingFinder

ENVIRONMENT = {
    # MegatronBaseModel._enable_nvidia_optimizations (nemo-toolkit 2.4.1) matches a regular expression
    # against this variable without asking whether it is set, and fails with a TypeError outside NVIDIA's
    # containers.
    "NVIDIA_PYTORCH_VERSION": "",
    # CUDA builds of torch with Triton start a compiler process per core as NeMo is imported, GPU or not
    # (torch/_inductor/async_compile.py, maybe_warm_pool), which nothing here makes enough use of.
    "TORCH_WARM_POOL": "0",
}
"""Environment variables that `enable` sets where they are unset, so that child processes inherit them."""

_finder: PatchingFinder | None = None


def enable() -> None:
    """Supplies what is missing for NeMo's Megatron models, in this process and those it forks.

    Without CUDA, calls that name it mean the CPU from then on. Without Apex, what NeMo uses of it is
    supplied when NeMo is imported. Call it before anything imports NeMo's ``nlp`` collection or
    megatron-core, once per process; more calls do nothing. `supplied` says what was missing.

    Raises:
        RuntimeError: there is no CUDA, or no compiler for it, and megatron-core or NeMo's nlp collection is
            imported already, so that they hold unpatched symbols.
    """
    global _finder
    import torch

    if _finder is not None:
        return
    without_cuda = not torch.cuda.is_available()
    patches = apex_stand_ins.PATCHES
    if without_cuda or not compiler_stand_ins.can_compile():
        patches = compiler_stand_ins.PATCHES + patches
        too_early = sorted({"megatron.core", "nemo.collections.nlp"} & sys.modules.keys())
        if too_early:
            raise RuntimeError(
                f"{', '.join(too_early)} imported before nemo_ee.runtime.stand_ins.enable(); call enable() first"
            )

    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if without_cuda:
        cuda_stand_ins.remember_factories()
        patches = cuda_stand_ins.PATCHES + patches
    _finder = PatchingFinder(patches)
    sys.meta_path.insert(0, _finder)
    for module in _finder.modules:
        if module in sys.modules or module.partition(".")[0] == "torch":
            importlib.import_module(module)
            _finder.apply(module)


def supplied() -> list[str]:
    """Dotted paths of the symbols that were missing and have a stand-in by now, in the order of their imports."""
    return [] if _finder is None else list(_finder.applied)
