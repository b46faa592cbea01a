# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The tensor of the pretend GPU: real memory of the host, and all rules of another device."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from tests.support.pretend_gpu import rules, waits

MARK = "_on_pretend_gpu"
"""An attribute of storages that belong to the device."""

_host_to = Tensor.to
_data = Tensor.data


class _Current:
    index = 0


def current_index() -> int:
    """Of the device that this process uses."""
    return _Current.index


def use_device(index: int) -> None:
    """Makes it the current one."""
    _Current.index = index


def current_device() -> torch.device:
    """What tensors of the device say."""
    return torch.device("cuda", _Current.index)


def on_device(device: Any) -> bool:
    """Whether one of torch's ways to name a device names the pretend GPU.

    Raises:
        RuntimeError: it names another GPU than the one that this process uses.
    """
    if device is None or isinstance(device, bool | torch.dtype):
        return False
    if isinstance(device, str):
        if not device.startswith("cuda"):
            return False
        device = torch.device(device)
    index = device if isinstance(device, int) else device.index
    if not isinstance(device, int) and device.type != "cuda":
        return False
    if index not in (None, _Current.index):
        raise RuntimeError(f"cuda:{index} is used in a process whose device is cuda:{_Current.index}")
    return True


def mixing(operation: str, plain: list[Tensor]) -> RuntimeError:
    """torch's error, with the shapes of what is on the host."""
    shapes = ", ".join(str(list(tensor.shape)) for tensor in plain)
    return RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, "
        f"{current_device()} and cpu! ({operation}; on the cpu: {shapes})"
    )


class CudaTensor(torch.Tensor):
    """Says that it is on a GPU. Its memory is the host's, so views, buffers of views and `.data` work as ever.

    C++ sees a CPU tensor, as there is no other backend to compute with; every operation on it, also those of
    autograd's engine, comes by `__torch_dispatch__`, where arguments are checked and waits are counted.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: Tensor) -> "CudaTensor":
        """The same memory, seen as the device's."""
        return torch.Tensor._make_subclass(cls, data, data.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Checks, counts, computes on the host, and gives results to the device."""
        kwargs = kwargs or {}
        if rules.is_composed(func):  # in inference mode; else it comes in its parts, by which waits are known
            return func.decompose(*args, **kwargs)
        _check(func, args, kwargs)
        with no_dispatch():
            out = func(*args, **kwargs)
        returned = rules.returned_arguments(func)
        if len(returned) == 1:
            return _result(out, returned[0], args, kwargs)
        if isinstance(out, tuple):
            return tuple(_result(o, r, args, kwargs) for o, r in zip(out, returned, strict=True))
        return out

    @property
    def device(self) -> torch.device:
        """The pretend GPU."""
        return current_device()

    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        """Its index."""
        return current_index()

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """To the host, another type, or both."""
        return move(self, args, kwargs)

    def cpu(self, memory_format: Any = torch.preserve_format) -> Tensor:
        """A copy on the host."""
        return to_host(self)

    def cuda(self, device: Any = None, non_blocking: bool = False, **_: Any) -> Tensor:
        """Itself."""
        on_device(device)
        return self

    def type(self, dtype: Any = None, non_blocking: bool = False) -> Any:
        """Its type's name, or a tensor of that type."""
        if dtype is None:
            return super().type().replace("torch.", "torch.cuda.", 1)
        return of_type(self, dtype)

    def numpy(self, **_: Any) -> Any:
        """Refused, as by torch."""
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def __array__(self, *_: Any, **__: Any) -> Any:
        """Refused, as by torch."""
        self.numpy()

    def __dlpack__(self, **_: Any) -> Any:
        """Refused: the consumer would take it for the host's."""
        raise BufferError("the pretend GPU's memory cannot be shared")

    def tolist(self) -> Any:
        """Waits."""
        waits.record("tolist")
        return plain(self).tolist()

    def pin_memory(self, *_: Any) -> Tensor:
        """Refused, as by torch."""
        raise RuntimeError(f"cannot pin '{self.type()}' only dense CPU tensors can be pinned")

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
        """On this device unless another is named."""
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device, **kwargs)

    def untyped_storage(self) -> torch.UntypedStorage:
        """Marked, so that a file says where it was."""
        storage = super().untyped_storage()
        setattr(storage, MARK, True)
        return storage

    @property
    def data(self) -> Tensor:
        """The tensor without its history."""
        return _data.__get__(self)

    @data.setter
    def data(self, new: Tensor) -> None:
        if not isinstance(new, CudaTensor):
            raise mixing("Tensor.data = …", [new])
        _data.__set__(self, new)

    @property
    def grad(self) -> Tensor | None:
        """The gradient, which must be on this device, too."""
        gradient = Tensor.grad.__get__(self)
        if gradient is not None and not isinstance(gradient, CudaTensor):
            raise mixing("a gradient made on the cpu", [gradient])
        return gradient

    @grad.setter
    def grad(self, new: Tensor | None) -> None:
        if new is not None and not isinstance(new, CudaTensor):
            raise mixing("Tensor.grad = …", [new])
        Tensor.grad.__set__(self, new)

    @grad.deleter
    def grad(self) -> None:
        Tensor.grad.__set__(self, None)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        waits.record("repr")
        return f"{plain(self)!r:.2000} on {self.device}"

    def __format__(self, spec: str) -> str:
        if self.dim() == 0:
            return self.item().__format__(spec)
        return repr(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As a CUDA tensor is written: other processes read the file without the pretend GPU."""
        if isinstance(self, torch.nn.Parameter):
            state = {k: v for k, v in self.__dict__.items() if k != "_is_param"}
            args = (self.detach(), self.requires_grad, OrderedDict())
            if state:
                return torch._utils._rebuild_parameter_with_state, (*args, state)
            return torch._utils._rebuild_parameter, args
        storage = torch.storage.TypedStorage(
            wrap_storage=self.untyped_storage(), dtype=self.dtype, _internal=True
        )
        place = (self.storage_offset(), tuple(self.size()), self.stride())
        return torch._utils._rebuild_tensor_v2, (storage, *place, self.requires_grad, OrderedDict())


def _result(out: Any, returned: tuple[int, str] | None, args: tuple, kwargs: dict) -> Any:
    if returned is not None:
        return rules.argument(*returned, args, kwargs)
    if isinstance(out, CudaTensor):
        return out
    if isinstance(out, Tensor):
        return CudaTensor(out)
    if isinstance(out, list):
        return [_result(each, None, args, kwargs) for each in out]
    return out


def _check(func: Any, args: tuple, kwargs: dict) -> None:
    name = rules.name_of(func)
    strangers = [t for t in rules.tensors_in(args, kwargs) if not isinstance(t, CudaTensor)]
    if strangers:
        if name in rules.MAY_CROSS:
            _crossing(args, kwargs)
            return
        strangers = _forbidden(func, name, strangers, args, kwargs)
        if strangers:
            raise mixing(str(func), strangers)
    generator = kwargs.get("generator")
    if generator is not None:
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device.type}'")
    if name in rules.WAITING:
        waits.record(str(func))
    elif name in rules.INDEXED and rules.selects_by_mask(name, args):
        waits.record(f"{func} by a mask")
    elif name == "repeat_interleave" and kwargs.get("output_size") is None:
        waits.record(f"{func} without output_size")


def _forbidden(func: Any, name: str, strangers: list[Tensor], args: tuple, kwargs: dict) -> list[Tensor]:
    """Those of the host's tensors that the operation does not take."""
    written = {id(rules.argument(*where, args, kwargs)) for where in rules.mutated(func)}
    allowed: set[int] = set()
    if name in rules.INDEXED and isinstance(args[0], CudaTensor):
        indices = [each for each in args[1] if each is not None and not isinstance(each, CudaTensor)]
        if indices:
            waits.record("upload of indices")
        allowed |= {id(each) for each in indices}
    if (made := rules.MADE_BY_TORCH.get(name)) and made in kwargs and kwargs[made].numel() == 0:
        waits.record(str(func))
        return [each for each in strangers if each is not kwargs[made]]
    if name in rules.PUT and not rules.has_mask(args) and _is_number_of_the_host(args[2]):
        waits.record("upload of a value put by index")
    if rules.takes_scalars(func):
        allowed |= {id(each) for each in strangers if _is_number_of_the_host(each)}
    return [each for each in strangers if id(each) not in allowed or id(each) in written]


def _is_number_of_the_host(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, CudaTensor) and value.dim() == 0


def _crossing(args: tuple, kwargs: dict) -> None:
    """A copy between host and device; without waiting only from or to pinned memory, or where not asked to."""
    target, source = args[0], args[1]
    non_blocking = rules.argument(2, "non_blocking", args, kwargs) or False
    if isinstance(target, list | tuple):
        target, source = target[0], source[0]
    _copied(
        to_the_device=isinstance(target, CudaTensor), host=target, other=source, non_blocking=non_blocking
    )


def _copied(to_the_device: bool, host: Tensor, other: Tensor, non_blocking: bool) -> None:
    if to_the_device:
        if not non_blocking:
            waits.record("upload")
    elif not (non_blocking and is_pinned(host)):
        waits.record("download")


def is_pinned(tensor: Tensor) -> bool:
    """Whether the host's tensor is in memory that the device reaches by itself."""
    return getattr(Tensor.untyped_storage(tensor), "_pinned", False)


def pinned(tensor: Tensor) -> Tensor:
    """A copy in such memory."""
    copy = tensor.clone()
    Tensor.untyped_storage(copy)._pinned = True
    return copy


# --- moving ---------------------------------------------------------------------------------------


def plain(tensor: Tensor) -> Tensor:
    """The same memory as the host's tensor, without history."""
    with no_dispatch():
        return tensor.detach()


class _ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return CudaTensor(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        waits.record("download")
        return plain(gradient).clone()


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return plain(tensor).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        waits.record("upload")
        return CudaTensor(gradient.detach().clone())


def to_device(tensor: Tensor, non_blocking: bool = False) -> Tensor:
    """A copy on the device; itself if it is there."""
    if isinstance(tensor, CudaTensor):
        return tensor
    if tensor.device.type == "meta":
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")
    _copied(to_the_device=True, host=tensor, other=tensor, non_blocking=non_blocking)
    if tensor.requires_grad and torch.is_grad_enabled():
        return _ToDevice.apply(tensor)
    return CudaTensor(tensor.detach().clone())


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host; itself if it is there."""
    if not isinstance(tensor, CudaTensor):
        return tensor
    waits.record("download")
    if tensor.requires_grad and torch.is_grad_enabled():
        return _ToHost.apply(tensor)
    return plain(tensor).clone()


def move(tensor: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """`Tensor.to` of any tensor."""
    kwargs = dict(kwargs)
    args = list(args)
    other = kwargs.pop("other", None)
    if args and isinstance(args[0], Tensor):
        other = args.pop(0)
    if other is not None:
        kwargs.update(device=other.device, dtype=other.dtype)
    elif args and (args[0] is None or isinstance(args[0], str | torch.device) or type(args[0]) is int):
        kwargs["device"] = args.pop(0)
    for name in ("dtype", "non_blocking", "copy"):
        if name == "dtype" and (other is not None or not (args and isinstance(args[0], torch.dtype | None))):
            continue
        if args:
            kwargs[name] = args.pop(0)
    device = kwargs.pop("device", None)
    non_blocking = kwargs.pop("non_blocking", False)
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if device is not None:
        moved = isinstance(tensor, CudaTensor) != (arriving := on_device(device))
        if arriving:
            tensor = to_device(tensor, non_blocking)
        elif torch.device(device).type == "cpu":
            tensor = to_host(tensor)
        else:
            with no_dispatch():
                return _host_to(tensor, device, **kwargs)
        if moved:
            kwargs.pop("copy", None)
    return _host_to(tensor, **kwargs) if kwargs else tensor


def of_type(tensor: Tensor, kind: Any) -> Tensor:
    """`Tensor.type` with a type: by name, class or torch.dtype."""
    if isinstance(kind, torch.dtype):
        return _host_to(tensor, kind)
    name = kind if isinstance(kind, str) else getattr(kind, "type_name", f"{kind.__module__}.{kind.__name__}")
    dtype = getattr(torch, name.rpartition(".")[2]).dtype
    moved = to_device(tensor) if name.startswith("torch.cuda.") else to_host(tensor)
    return _host_to(moved, dtype)
