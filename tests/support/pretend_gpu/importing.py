# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The pretend GPU comes with torch, in processes that nobody prepared."""

import importlib.abc
import importlib.util
import sys
from typing import Any


class EnablingFinder(importlib.abc.MetaPathFinder):
    """Enables pretend GPUs once torch has been imported.

    Args:
        gpus: how many.
    """

    def __init__(self, gpus: int) -> None:
        self.gpus = gpus

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """Finds torch alone, by the finders behind this one."""
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute, gpus = spec.loader.exec_module, self.gpus

        def execute_and_enable(module: Any) -> None:
            execute(module)
            from tests.support.pretend_gpu import enable

            enable(gpus)

        spec.loader.exec_module = execute_and_enable  # type: ignore[method-assign]
        return spec
