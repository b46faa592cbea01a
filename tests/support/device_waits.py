# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Finds, on a CPU, what would make the host wait for a GPU: values that it reads, and copies that it makes.

What is read (`.item()`, `bool(tensor)`, `.tolist()`, …), shapes that depend on values (`nonzero`, `x[mask]`), and small
copies from the host that torch waits for (`torch.tensor(…, device=…)`, `x[rows] = 0`). Not found: `.to(device)`, which
does nothing here.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    Tensor.tolist,
    Tensor.numpy,
    Tensor.cpu,
    Tensor.__array__,
    Tensor.__repr__,
    Tensor.__format__,
    Tensor.__contains__,
}
"""What a CPU does without asking the dispatcher."""
VALUES = {
    "_local_scalar_dense",
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "equal",
    "is_nonzero",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
}
"""Operators of aten that hand a value, or a shape made of values, to the host."""
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
HOST_ONLY = {("layer_dropout.py", "kept"), ("layer_dropout.py", "__call__")}
"""Where the host reads what it has drawn itself, which never was on a device: (file, function)."""
PASSED_THROUGH = ("/torch/", "/nemo_ee/runtime/", "device_waits.py")
"""Files that are not where something waits, but on the way."""


@dataclass
class DeviceWaits:
    """Waits between `start` and the last call of `mark`.

    Attributes:
        found: what waits, and the innermost line of who called torch, e.g. "nonzero at nemo_ee/megatron/x.py:12 in f".
        marked: how many of them came before the last mark.
        marks: how often `mark` was called.
    """

    found: list[str] = field(default_factory=list)
    marked: int = 0
    marks: int = 0
    counting: bool = False

    def start(self, *_: Any) -> None:
        """Counts from now on."""
        self.counting = True

    def mark(self, *_: Any) -> None:
        """All until now count."""
        self.marked, self.marks = len(self.found), self.marks + 1

    def between(self) -> list[str]:
        """What waited before the last mark."""
        return self.found[: self.marked]

    def note(self, what: str) -> None:
        """Something waits."""
        if not self.counting:
            return
        place = [
            f for f in traceback.extract_stack() if not any(part in f.filename for part in PASSED_THROUGH)
        ][-1]
        if (Path(place.filename).name, place.name) not in HOST_ONLY:
            name = "/".join(Path(place.filename).parts[-3:])
            self.found.append(f"{what} at {name}:{place.lineno} in {place.name}")

    @contextmanager
    def watching(self) -> Iterator["DeviceWaits"]:
        """Watches what this thread does, backward passes included."""
        with _Functions(self), _Operators(self):
            yield self


class _Functions(TorchFunctionMode):
    def __init__(self, waits: DeviceWaits):
        super().__init__()
        self.waits = waits

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            self.waits.note(func.__name__)
        elif getattr(func, "__name__", "") in ("tensor", "as_tensor") and kwargs.get("device") is not None:
            self.waits.note(f"{func.__name__} from the host")  # by name, since the CPU runtime wraps it
        elif func is Tensor.new_tensor:
            self.waits.note("new_tensor from the host")
        elif (
            func is Tensor.__setitem__
            and not isinstance(args[2], Tensor)
            and _is_one_element(args[0], args[1])
        ):
            self.waits.note("an element set from the host")
        return func(*args, **kwargs)


def _is_one_element(x: Tensor, index: Any) -> bool:
    index = index if isinstance(index, tuple) else (index,)
    return len(index) == x.dim() and all(type(i) is int for i in index)


class _Operators(TorchDispatchMode):
    def __init__(self, waits: DeviceWaits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name in VALUES or (name == "repeat_interleave" and (kwargs or {}).get("output_size") is None):
            self.waits.note(name)
        elif name in INDEXED:
            indices = [i for i in args[1] if i is not None]
            masks = [i for i in indices if i.dtype in (torch.bool, torch.uint8)]
            one = len(args) > 2 and args[2].dim() == 0
            if masks and not (one and len(masks) == len(indices) == 1):  # else torch fills by the mask
                self.waits.note(f"{name} by a mask")
            elif one and not masks:
                self.waits.note(f"{name} from the host")
        return func(*args, **(kwargs or {}))


def of_steps(kind: type, counter: type = DeviceWaits) -> type:
    """A model class whose training steps note in `waits` what waits between first forward and last backward.

    Args:
        kind: the model's class.
        counter: what finds waits: on a CPU `DeviceWaits`, on a pretend GPU `tests.support.pretend_gpu.waits.Window`.
    """

    class Watched(kind):
        waits: list[list[str]]

        def fwd_bwd_step(self, dataloader_iter: Any, forward_only: bool, *more: Any) -> Any:
            if forward_only:
                return super().fwd_bwd_step(dataloader_iter, forward_only, *more)
            seen = counter()
            handles = [self.gpt.decoder.register_forward_pre_hook(seen.start)]
            for parameter in self.gpt.parameters():
                if parameter.requires_grad:
                    handles.append(parameter.register_post_accumulate_grad_hook(seen.mark))
            try:
                with seen.watching():
                    result = super().fwd_bwd_step(dataloader_iter, forward_only, *more)
            finally:
                for handle in handles:
                    handle.remove()
            assert seen.counting and seen.marks, "a forward and a backward pass were seen"
            self.waits = [*getattr(self, "waits", []), seen.between()]
            return result

    return Watched
