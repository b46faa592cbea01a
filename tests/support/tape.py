# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What a CUDA graph does, on a CPU: operations are recorded with their tensors and repeated on the same ones.

It refuses what a graph cannot record (reading a result on the host, copies from the host, shapes that depend on
values), and what a graph records but repeats with other memory: tensors that nobody keeps, and those that another
capture has made, whose memory a replay may use for something else.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from nemo_ee.decoding.cuda.cuda_capture import CapturedPass, PassFunction

NOT_CAPTURED = (
    "_local_scalar_dense",
    "nonzero",
    "lift_fresh",
    "equal",
    "is_nonzero",
    "unique",
    "_unique2",
    "masked_select",
    "bincount",
    "_pin_memory",
)
"""Operations that wait for the device, or copy to it from memory that may be gone at a replay."""
HOST_READS = ("tolist", "numpy", "item", "__array__", "__bool__", "__int__", "__float__", "__index__", "cpu")
"""Methods that wait for the device; on a CPU no operation shows it."""
NOT_PERMITTED = "operation not permitted when stream is capturing"


class _NoHostReads(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") in HOST_READS:
            raise RuntimeError(f"{NOT_PERMITTED}: Tensor.{func.__name__}")
        return func(*args, **(kwargs or {}))


class _Outside:
    """A tensor that was there before the recording, and must be there at a replay."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor, self._text = weakref.ref(tensor), f"{tuple(tensor.shape)} of {tensor.dtype}"
        self._address = tensor.data_ptr()

    def found(self) -> torch.Tensor:
        tensor = self._tensor()
        if tensor is None or tensor.data_ptr() != self._address:
            raise RuntimeError(f"a captured pass reads memory that is gone: {self._text}")
        return tensor


class Tape(TorchDispatchMode):
    """Records the operations inside its context.

    Args:
        foreign: addresses that other captures have reserved.

    Raises:
        RuntimeError: for an operation that a CUDA graph could not record.

    Attributes:
        made: address -> a tensor there, of all that the operations have reserved.
    """

    def __init__(self, foreign: Callable[[int], bool] = lambda address: False) -> None:
        super().__init__()
        self.made: dict[int, torch.Tensor] = {}
        self._foreign = foreign
        self._mine: dict[int, torch.Tensor] = {}  # all results: an id stands for one tensor while it lives
        self._recorded: list[tuple[Any, Any, Any, list]] = []
        self._steps: list[tuple[Any, Any, Any, list]] | None = None
        self._host = _NoHostReads()

    def __enter__(self) -> "Tape":
        self._host.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._host.__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Runs and records."""
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(each.dtype == torch.bool for each in tensors[1:])
        by_value = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in NOT_CAPTURED or by_mask or by_value:
            raise RuntimeError(f"{NOT_PERMITTED}: {func}")
        inputs = {each.untyped_storage().data_ptr() for each in tensors}
        if any(self._foreign(address) for address in inputs):
            raise RuntimeError(
                f"{func} reads what another capture has made: a replay may have other things there"
            )
        with torch._C.DisableTorchFunction():  # what an operation does inside is its own affair
            out = func(*args, **kwargs)
        plain = tree_map(self._outside, (args, kwargs))
        outputs = tree_leaves(out)
        for each in outputs:
            if isinstance(each, torch.Tensor) and not any(each is tensor for tensor in tensors):
                self._mine[id(each)] = each
                address = each.untyped_storage().data_ptr()
                if address not in inputs:
                    self.made[address] = each
        self._recorded.append((func, *plain, outputs))
        return out

    def _outside(self, leaf: Any) -> Any:
        return _Outside(leaf) if isinstance(leaf, torch.Tensor) and id(leaf) not in self._mine else leaf

    def replay(self) -> None:
        """Repeats them; what was a new tensor then is written over."""
        if self._steps is None:
            self._steps = [
                (
                    func,
                    *tree_map(lambda x: x.found() if isinstance(x, _Outside) else x, (args, kwargs)),
                    outputs,
                )
                for func, args, kwargs, outputs in self._recorded
            ]
        for func, args, kwargs, outputs in self._steps:
            result = func(*args, **kwargs)
            for old, new in zip(outputs, tree_leaves(result), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeCapture:
    """Captures passes on tapes, which spoil each other's results as graphs of one memory pool may.

    Args:
        fail_at: the capture that is refused, counted from 1; None refuses none.
        error: that it is refused with.

    Attributes:
        passes: captured so far.
        replays: how many.
    """

    def __init__(self, fail_at: int | None = None, error: type[RuntimeError] = RuntimeError) -> None:
        self.fail_at, self.error = fail_at, error
        self.passes: list[CapturedPass] = []
        self.replays = 0
        self._tapes: list[Tape] = []
        self._results: tuple[torch.Tensor, ...] = ()

    def __call__(self, run: PassFunction) -> CapturedPass:
        """Calls the pass twice, as `CudaCapture` does."""
        run()
        if len(self.passes) + 1 == self.fail_at:
            raise self.error(f"refused capture {self.fail_at}")
        made = [tape.made for tape in self._tapes]
        with Tape(lambda address: any(address in each for each in made)) as tape:
            outputs = run()
        self._tapes.append(tape)
        for each in tape.made.values():
            spoil(each)

        def replay() -> None:
            self.replays += 1
            for each in self._results:
                spoil(each)
            self._results = outputs
            tape.replay()

        self.passes.append(CapturedPass(replay, outputs))
        return self.passes[-1]


def spoil(tensor: torch.Tensor) -> None:
    """Makes all its numbers useless."""
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    elif tensor.dtype != torch.bool:
        tensor.fill_(-(2**30))
