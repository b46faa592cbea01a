# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""torch's own ways to the device: factories, moves, assignment, files, compilation, autocast."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from tests.support.pretend_gpu import tensor as pretend
from tests.support.pretend_gpu import waits
from tests.support.pretend_gpu.tensor import CudaTensor, on_device

FACTORIES = (
    "arange empty empty_strided eye full linspace logspace ones rand randint randn randperm zeros "
    "tril_indices triu_indices"
).split()
LIKES = "empty_like full_like ones_like rand_like randint_like randn_like zeros_like".split()
METHODS = "new_empty new_full new_ones new_zeros".split()


def patch() -> None:
    """Changes torch in this process."""
    torch.utils._device._device_constructors()  # torch lists its factories before they are wrapped
    for name in FACTORIES:
        setattr(torch, name, _known_to_torchscript(getattr(torch, name), _factory))
    for name in LIKES:
        setattr(torch, name, _known_to_torchscript(getattr(torch, name), _like))
    for name in METHODS:
        setattr(Tensor, name, _like(getattr(Tensor, name)))
    torch.tensor = _known_to_torchscript(torch.tensor, _tensor)
    torch.as_tensor = _known_to_torchscript(torch.as_tensor, _as_tensor)
    torch.asarray = _as_tensor(torch.asarray)
    _patch_methods()
    _patch_files()
    _patch_autograd()
    _patch_the_rest()


def _known_to_torchscript(original: Callable, wrap: Callable) -> Callable:
    wrapped = wrap(original)
    operator = torch.jit._builtins._find_builtin(original)
    if operator is not None:
        torch.jit._builtins._register_builtin(wrapped, operator)
    return wrapped


def _default_device(kwargs: dict) -> Any:
    """What a factory is told, or `with torch.device(…)` around it."""
    device = kwargs.get("device")
    if device is None and torch._C._len_torch_function_stack():
        for i in reversed(range(torch._C._len_torch_function_stack())):
            mode = torch._C._get_function_stack_at(i)
            if isinstance(mode, torch.utils._device.DeviceContext):
                return mode.device
    return device


def _factory(original: Callable) -> Callable:
    @functools.wraps(original)
    def make(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("device") is None and not torch._C._len_torch_function_stack():
            return original(*args, **kwargs)
        device = _default_device(kwargs)
        if not on_device(device):
            return original(*args, **kwargs)
        if (generator := kwargs.get("generator")) is not None:
            raise RuntimeError(
                f"Expected a 'cuda' device type for generator but found '{generator.device.type}'"
            )
        kwargs["device"] = "cpu"
        out = kwargs.pop("out", None)
        made = CudaTensor(original(*args, **kwargs))
        return made if out is None else out.resize_(made.shape).copy_(made)

    return make


def _like(original: Callable) -> Callable:
    """Of functions and methods that take the device of their first argument."""

    @functools.wraps(original)
    def make(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device")
        if device is None:
            return original(tensor, *args, **kwargs)
        if on_device(device):
            kwargs["device"] = "cpu"
            with no_dispatch():
                return CudaTensor(original(tensor, *args, **kwargs))
        with no_dispatch():
            return original(tensor, *args, **kwargs)

    return make


def _tensor(original: Callable) -> Callable:
    @functools.wraps(original)
    def make(
        data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False, **rest: Any
    ) -> Tensor:
        device = _default_device(dict(device=device))
        if isinstance(data, CudaTensor):
            made = data.detach().to(device=device, dtype=dtype).clone()
            return made.requires_grad_(requires_grad)
        _read_each(data)
        if not on_device(device):
            return original(data, dtype=dtype, device=device, requires_grad=requires_grad, **rest)
        waits.record("upload")
        made = CudaTensor(original(data, dtype=dtype, device="cpu", **rest))
        return made.requires_grad_(requires_grad)

    return make


def _read_each(data: Any) -> None:
    """torch asks each of the device's tensors in a list for its number, below all Python."""
    if isinstance(data, list | tuple):
        for each in data:
            if isinstance(each, CudaTensor):
                waits.record("a tensor of the device's numbers")
            else:
                _read_each(each)


def _as_tensor(original: Callable) -> Callable:
    @functools.wraps(original)
    def make(data: Any, dtype: Any = None, device: Any = None, **rest: Any) -> Tensor:
        device = _default_device(dict(device=device))
        if isinstance(data, CudaTensor) or (isinstance(data, Tensor) and on_device(device)):
            return data.to(device=device, dtype=dtype)
        _read_each(data)
        if not on_device(device):
            return original(data, dtype=dtype, device=device, **rest)
        waits.record("upload")
        return CudaTensor(original(data, dtype=dtype, device="cpu", **rest))

    return make


def _patch_methods() -> None:
    host_to, host_type, host_data = Tensor.to, Tensor.type, Tensor.data

    @functools.wraps(host_to)
    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first = args[0] if args else kwargs.get("other")
        if isinstance(first, CudaTensor) or on_device(kwargs.get("device")):
            return pretend.move(self, args, kwargs)
        if isinstance(first, str | torch.device | int) and on_device(first):
            return pretend.move(self, args, kwargs)
        return host_to(self, *args, **kwargs)

    @functools.wraps(Tensor.cuda)
    def cuda(self: Tensor, device: Any = None, non_blocking: bool = False, **_: Any) -> Tensor:
        on_device(device)
        return pretend.to_device(self, non_blocking)

    @functools.wraps(host_type)
    def type_(self: Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        name = dtype if isinstance(dtype, str) else getattr(dtype, "type_name", "")
        if name.startswith("torch.cuda."):
            return pretend.of_type(self, dtype)
        return host_type(self, dtype, *args, **kwargs)

    def set_data(self: Tensor, new: Tensor) -> None:
        if isinstance(new, CudaTensor):  # the object stays the same while its memory moves
            moved = (
                torch.nn.Parameter(new, self.requires_grad)
                if isinstance(self, torch.nn.Parameter)
                else new.detach()
            )
            torch.utils.swap_tensors(self, moved)
        else:
            host_data.__set__(self, new)

    Tensor.to, Tensor.cuda, Tensor.type = to, cuda, type_
    Tensor.data = property(host_data.__get__, set_data)
    Tensor.pin_memory = lambda self, *_: pretend.pinned(self)
    Tensor.is_pinned = lambda self, *_: pretend.is_pinned(self)
    # Modules move as on a GPU: each parameter stays the object that it is, so what is tied stays tied.
    torch.utils.swap_tensors = _keeping_attributes(torch.utils.swap_tensors)
    torch.__future__.set_swap_module_params_on_conversion(True)
    importlib.import_module("torch.optim.optimizer")._foreach_supported_types.append(CudaTensor)


def _keeping_attributes(swap: Callable) -> Callable:
    """Swaps memory and class where a tensor changes its device: what the program wrote on the object stays on it."""

    @functools.wraps(swap)
    def swap_tensors(first: Tensor, second: Tensor) -> None:
        if not isinstance(first, CudaTensor) and not isinstance(second, CudaTensor):
            return swap(first, second)
        parameters = [isinstance(each, torch.nn.Parameter) for each in (second, first)]
        swap(first, second)
        first.__dict__, second.__dict__ = second.__dict__, first.__dict__
        for each, is_parameter in zip((first, second), parameters, strict=True):
            each.__dict__.pop("_is_param", None)
            if is_parameter and isinstance(each, CudaTensor):
                each._is_param = True

    return swap_tensors


def _patch_files() -> None:
    """A file says where tensors were, and they return there unless `map_location` says otherwise."""
    rebuild = torch._utils._rebuild_tensor

    def rebuild_tensor(storage: Any, *args: Any) -> Tensor:
        made = rebuild(storage, *args)
        untyped = getattr(storage, "_untyped_storage", storage)
        return CudaTensor(made) if getattr(untyped, pretend.MARK, False) else made

    def location(storage: Any) -> str | None:
        return str(pretend.current_device()) if getattr(storage, pretend.MARK, False) else None

    def restore(storage: Any, location: str) -> Any:
        if not location.startswith(
            "cuda"
        ):  # another rank's GPU is as good as this one: it may be told objects
            return None
        setattr(storage, pretend.MARK, True)
        return storage

    torch._utils._rebuild_tensor = rebuild_tensor
    torch.serialization.register_package(0, location, restore)


def _patch_autograd() -> None:
    backward, grad = torch.autograd.backward, torch.autograd.grad

    def check(tensors: Any, gradients: Any) -> None:
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        gradients = [gradients] if isinstance(gradients, Tensor) else list(gradients or ())
        for tensor, gradient in zip(tensors, gradients, strict=False):
            if gradient is not None and isinstance(tensor, CudaTensor) != isinstance(gradient, CudaTensor):
                raise pretend.mixing("the gradient to begin with", [gradient])

    @functools.wraps(backward)
    def checked_backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        check(tensors, grad_tensors)
        backward(tensors, grad_tensors, *args, **kwargs)

    @functools.wraps(grad)
    def checked_grad(outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        check(outputs, grad_outputs)
        return grad(outputs, inputs, grad_outputs, *args, **kwargs)

    torch.autograd.backward, torch.autograd.grad = checked_backward, checked_grad


def _patch_the_rest() -> None:
    init = torch.amp.autocast_mode.autocast.__init__

    def autocast(self: Any, device_type: Any, *args: Any, **kwargs: Any) -> None:
        init(self, "cpu" if on_device(device_type) else device_type, *args, **kwargs)

    torch.amp.autocast_mode.autocast.__init__ = autocast
    for name in ("custom_fwd", "custom_bwd"):
        setattr(torch.amp, name, _for_the_cpu(getattr(torch.amp, name)))
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        setattr(torch, name, _of_the_cpu(getattr(torch, name)))

    def compile(model: Any = None, **_: Any) -> Any:  # noqa: A001
        return (lambda function: function) if model is None else model

    functional = torch.nn.functional
    functional.scaled_dot_product_attention = _with_its_mask(functional.scaled_dot_product_attention)
    torch.compile = compile


def _with_its_mask(original: Callable) -> Callable:
    """Causal attention with a mask made here: torch 2.7's C++ makes it on what it takes for the tensors' device."""

    @functools.wraps(original)
    def attention(query: Tensor, key: Tensor, *args: Any, is_causal: bool = False, **kwargs: Any) -> Tensor:
        if is_causal and isinstance(query, CudaTensor):
            size = query.shape[-2], key.shape[-2]
            kwargs["attn_mask"] = torch.ones(size, dtype=torch.bool, device=query.device).tril()
            is_causal = False
        return original(query, key, *args, is_causal=is_causal, **kwargs)

    return attention


def _for_the_cpu(original: Callable) -> Callable:
    def decorate(*args: Any, device_type: str, **kwargs: Any) -> Any:
        return original(*args, device_type="cpu" if on_device(device_type) else device_type, **kwargs)

    return functools.wraps(original)(decorate)


def _of_the_cpu(original: Callable) -> Callable:
    def ask(device_type: str = "cuda") -> Any:
        return original("cpu" if on_device(device_type) else device_type)

    return functools.wraps(original)(ask)
