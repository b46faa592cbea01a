# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What a CUDA graph does, on a CPU: operations are recorded with their tensors and repeated on the same ones."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_ee.megatron.cuda_capture import CapturedPass, Pass

NOT_CAPTURED = (
    "_local_scalar_dense",
    "nonzero",
    "lift_fresh",
    "equal",
    "is_nonzero",
    "unique",
    "masked_select",
)
"""Operations that wait for the device, or copy to it from memory that may be gone at a replay."""


class Tape(TorchDispatchMode):
    """Records the operations inside its context.

    Raises:
        RuntimeError: for an operation that a CUDA graph could not record.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, tuple, dict, list]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Runs and records."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(each.dtype == torch.bool for each in tensors[1:])
        if name in NOT_CAPTURED or by_mask:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, tree_leaves(out)))
        return out

    def replay(self) -> None:
        """Repeats them; what was a new tensor then is written over."""
        for func, args, kwargs, outputs in self.steps:
            for old, new in zip(outputs, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeCapture:
    """Captures passes on tapes, which spoil each other's outputs as graphs of one memory pool may.

    Args:
        fail_at: the capture that is refused, counted from 1; None refuses none.

    Attributes:
        passes: captured so far.
        replays: how many.
    """

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.passes: list[CapturedPass] = []
        self.replays = 0

    def __call__(self, run: Pass) -> CapturedPass:
        """Calls the pass twice, as `CudaCapture` does."""
        run()
        if len(self.passes) + 1 == self.fail_at:
            raise RuntimeError(f"refused capture {self.fail_at}")
        with Tape() as tape:
            outputs = run()

        def replay() -> None:
            self.replays += 1
            for other in self.passes:
                for output in other.outputs:
                    output.fill_(float("nan") if output.is_floating_point() else -(2**40))
            tape.replay()

        self.passes.append(CapturedPass(replay, outputs))
        return self.passes[-1]
