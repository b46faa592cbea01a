# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What autocast promotes to float32 on a GPU, and not on a CPU: norms, softmax, sums and more."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

LISTS = "AT_FORALL_FP32", "AT_FORALL_FP32_SET_OPT_DTYPE"


@cache
def promoted() -> frozenset[str]:
    """Names of operations, as torch's own header lists them."""
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    text, names = header.read_text().replace("\\\n", "\n"), set()
    for name in LISTS:
        body = text.split(f"#define {name}(_)", 1)[1].split("#define", 1)[0]
        names.update(re.findall(r"^\s*_\((\w+)", body, re.MULTILINE))
    return frozenset(names)


class CudaPromotions(TorchFunctionMode):
    """Within, those operations compute in float32 and return it, whatever lower precision their inputs have.

    Together with `torch.autocast("cpu", …)`, which lowers matrix products, dtypes are those of autocast on a GPU.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs one operation."""
        if getattr(func, "__name__", "") in promoted() and torch.is_autocast_enabled("cpu"):
            args = tuple(map(_widened, args))
            kwargs = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _widened(value: Any) -> Any:
    low = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if low else value
