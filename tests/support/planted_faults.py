# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Faults to be found: each changes what the final exit does with hidden states on a GPU.

`environment(fault)` has every Python process of a command begin with the fault, on pretend GPUs.
"""

import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from tests.support import pretend_gpu

VARIABLE = "NEMO_EE_TEST_FAULT"
WHERE = "nemo_ee.decoding.layers.lean_head"
WRONG_DEVICE, WRONG_TOKEN, WAIT = "a tensor on the wrong device", "a wrong token", "a wait in a graph"
FAULTS = (WRONG_DEVICE, WRONG_TOKEN, WAIT)


def environment(fault: str | None = None) -> dict[str, str]:
    """Of a command whose processes have a pretend GPU, and a fault if one is given."""
    mine = pretend_gpu.environment()
    site = str(Path(__file__).parent / "faulty_site")
    return mine if fault is None else {**mine, VARIABLE: fault, "PYTHONPATH": f"{site}:{mine['PYTHONPATH']}"}


def plant(fault: str) -> None:
    """Plants a fault in this process; the CPU's own results stay right."""
    import torch

    from nemo_ee.decoding.layers.lean_head import LeanOutput

    predict = LeanOutput.predict

    def faulty(output: Any, x: torch.Tensor, *more: Any) -> Any:
        if x.device.type == "cuda":
            if fault == WRONG_DEVICE:
                x = x + torch.zeros(x.shape[-1], dtype=x.dtype)
            elif fault == WRONG_TOKEN:
                x = torch.cat([-x[:1], x[1:]])
            elif fault == WAIT:
                x.sum().item()
        return predict(output, x, *more)

    assert fault in FAULTS, fault
    LeanOutput.predict = faulty  # type: ignore[method-assign]


class PlantingFinder(importlib.abc.MetaPathFinder):
    """Plants a fault once its place has been imported."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """Finds that module alone, by the finders behind this one."""
        if fullname != WHERE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_plant(module: Any) -> None:
            execute(module)
            plant(self.fault)

        spec.loader.exec_module = execute_and_plant  # type: ignore[method-assign]
        return spec


def plant_with_its_place() -> None:
    """Has the import of the fault's place plant it, if the environment asks for one."""
    if fault := os.environ.get(VARIABLE):
        sys.meta_path.insert(0, PlantingFinder(fault))
