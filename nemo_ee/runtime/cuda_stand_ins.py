# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What CUDA would provide, where it is absent: calls that name it mean the CPU.

NeMo and Megatron write ``device="cuda"``, ``.cuda()`` and ``torch.cuda.current_device()`` literally; here they all
mean the CPU, and ``.cuda()`` returns the tensor itself, as it does on a GPU for a tensor that is already there.

Only the replaced functions pay: 0.7 to 1 microsecond more per call of a tensor factory, ``Tensor.to`` and
``Tensor.type``. Matrix products, views and arithmetic run untouched, in every thread, so a decode loop needs
no way around the stand-ins. A `torch.overrides.TorchFunctionMode` would take less code, but adds 1.5 to 5
microseconds to *every* torch call and holds only in the thread that entered it.
"""

import functools
from collections.abc import Callable
from typing import Any

from nemo_ee.runtime.apex_stand_ins import MultiTensor, multi_tensor_l2norm
from nemo_ee.runtime.patching import LIGHTNING, MEGATRON, NEMO, TORCH, Patch

# --- devices --------------------------------------------------------------------------------------


def _is_cuda(device: Any) -> bool:
    """Whether `device` names a CUDA device in one of torch's ways: "cuda:0", torch.device("cuda") or 0."""
    if isinstance(device, str):
        return device.startswith("cuda")
    if type(device) is int:  # not bool: Tensor.to(dtype, non_blocking) may pass True by position
        return True
    return getattr(device, "type", None) == "cuda"  # torch.device; dtypes, tensors and None have no such type


def _on_cpu(factory: Callable) -> Callable:
    """A tensor factory that takes ``device="cuda"`` for the CPU. TorchScript still sees the built-in."""
    import torch

    @functools.wraps(factory)
    def on_cpu(*args, **kwargs):
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    operator = torch.jit._builtins._find_builtin(factory)
    if operator is not None:
        torch.jit._builtins._register_builtin(on_cpu, operator)
    return on_cpu


def remember_factories() -> None:
    """Lets torch list its factories before they are wrapped.

    ``with torch.device("meta")`` recognises factories by identity against a list made at first use. The
    wrappers call the originals, so the originals must be in it.
    """
    import torch.utils._device

    torch.utils._device._device_constructors()


def _tensor_to(original):
    def to(self, *args, **kwargs):
        if args and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        return original(self, *args, **kwargs)

    return functools.wraps(original)(to)


def _tensor_type(original):
    def type(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        # Asked for its name, a tensor says what it would be called on a GPU.
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return functools.wraps(original)(type)


def _returns_self(original):
    return functools.wraps(original)(lambda self, *args, **kwargs: self)


def _does_nothing(original):
    return functools.wraps(original)(lambda *args, **kwargs: None)


def _returns_cpu_device(original):
    import torch

    return functools.wraps(original)(lambda: torch.device("cpu"))


def _cpu_tensor_type(name: str) -> Callable[[Any], Any]:
    def replacement(original):
        import torch

        return getattr(torch, name)

    return replacement


class _Stream:
    """Stands for a CUDA stream where there is one queue of work only: the program itself."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream):
        pass

    def synchronize(self):
        pass


# --- autocast -------------------------------------------------------------------------------------


def _autocast_init(original):
    def __init__(self, device_type, *args, **kwargs):
        original(self, "cpu" if _is_cuda(device_type) else device_type, *args, **kwargs)

    return functools.wraps(original)(__init__)


def _custom_autograd(original):
    def decorate(*args, device_type, **kwargs):
        return original(*args, device_type="cpu" if _is_cuda(device_type) else device_type, **kwargs)

    return functools.wraps(original)(decorate)


# --- random numbers -------------------------------------------------------------------------------


def _get_rng_state(original):
    import torch

    return functools.wraps(original)(lambda *args, **kwargs: torch.default_generator.get_state())


def _set_rng_state(original):
    import torch

    return functools.wraps(original)(
        lambda state, *args, **kwargs: torch.default_generator.set_state(state) and None
    )


def _manual_seed(original):
    import torch

    return functools.wraps(original)(lambda seed: torch.default_generator.manual_seed(int(seed)) and None)


def _seed_model_parallel(original):
    def _set_random_seed(seed_):
        from megatron.core import parallel_state, tensor_parallel

        original(seed_)
        tensor_parallel.model_parallel_cuda_manual_seed(
            seed_ + 100 * parallel_state.get_pipeline_model_parallel_rank()
        )

    return functools.wraps(original)(_set_random_seed)


# --- optimizer ------------------------------------------------------------------------------------


def _synchronous_gradients(original):
    def configure_optimizers(self):
        from nemo.utils import logging
        from omegaconf import open_dict

        if self.cfg.get("megatron_amp_O2", False) and self.cfg.get("async_grad_allreduce", True):
            logging.info("No CUDA: model.async_grad_allreduce=False, as nothing here waits for it to finish")
            with open_dict(self.cfg):
                self.cfg.async_grad_allreduce = False
        return original(self)

    return functools.wraps(original)(configure_optimizers)


def _scale_in_torch(original):
    from megatron.core.utils import local_multi_tensor_scale

    return local_multi_tensor_scale


def _adam_of_torch(original):
    import torch

    return torch.optim.AdamW


# --- the table ------------------------------------------------------------------------------------

_FACTORIES = (
    "arange as_tensor empty empty_like eye full full_like linspace ones ones_like "
    "rand rand_like randint randn randn_like randperm tensor zeros zeros_like"
).split()
_TENSOR_TYPES = [f"{kind}Tensor" for kind in "BFloat16 Bool Byte Double Float Half Int Long".split()]


_COMMON = "nemo.collections.nlp.modules.common.megatron"
_MCORE_OPTIM = "megatron.core.optimizer"
_KERNELS = "is Apex's or Transformer Engine's, where that is installed, and takes CUDA tensors alone"

PATCHES: tuple[Patch, ...] = (
    # Devices.
    *(Patch("torch", name, TORCH, 'called with device="cuda"', _on_cpu) for name in _FACTORIES),
    Patch("torch", "Tensor.cuda", TORCH, "batches, losses and prompts are moved with .cuda()", _returns_self),
    Patch("torch", "Tensor.to", TORCH, "called with a CUDA device", _tensor_to),
    Patch("torch", "Tensor.type", TORCH, "optimizers accept 'torch.cuda.*Tensor' names only", _tensor_type),
    Patch("torch.nn", "Module.cuda", TORCH, "models and DDP wrappers are moved with .cuda()", _returns_self),
    Patch("torch.cuda", "current_device", TORCH, "passed as device=", _returns_cpu_device),
    Patch("torch.cuda", "set_device", TORCH, "called for the local rank", _does_nothing),
    Patch("torch.cuda", "synchronize", TORCH, "called after every batched send and receive", _does_nothing),
    Patch("torch.cuda", "Stream", TORCH, "made for overlapped communication", lambda original: _Stream),
    Patch("torch.cuda", "current_stream", TORCH, "waited on", lambda original: _Stream),
    Patch("torch.cuda", "default_stream", TORCH, "waited on", lambda original: _Stream),
    *(
        Patch("torch.cuda", name, TORCH, "a constructor and an isinstance test", _cpu_tensor_type(name))
        for name in _TENSOR_TYPES
    ),
    Patch(
        "lightning.fabric.utilities.device_dtype_mixin",
        "_DeviceDtypeModuleMixin.cuda",
        LIGHTNING,
        "MegatronGPTModel.generate calls self.cuda(), and Lightning's own looks for a CUDA device",
        _returns_self,
    ),
    # Autocast.
    Patch(
        "torch.amp.autocast_mode",
        "autocast.__init__",
        TORCH,
        'Megatron\'s schedules enter autocast("cuda"), which does nothing without a GPU',
        _autocast_init,
    ),
    *(
        Patch("torch.amp", name, TORCH, 'Megatron\'s linear layers use device_type="cuda"', _custom_autograd)
        for name in ("custom_fwd", "custom_bwd")
    ),
    # Random numbers: the CPU generator is the device generator.
    Patch("torch.cuda", "get_rng_state", TORCH, "the RNG tracker saves the device's state", _get_rng_state),
    Patch("torch.cuda", "set_rng_state", TORCH, "recompute restores the device's state", _set_rng_state),
    Patch("torch.cuda", "manual_seed", TORCH, "the RNG tracker seeds the device", _manual_seed),
    Patch(
        "megatron.core.tensor_parallel.random",
        "_get_cuda_rng_state",
        MEGATRON,
        "reads a CUDA generator",
        _get_rng_state,
    ),
    Patch(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        MEGATRON,
        "writes a CUDA generator",
        _set_rng_state,
    ),
    Patch(
        f"{_COMMON}.megatron_init",
        "_set_random_seed",
        NEMO,
        "seeds the RNG tracker only where a GPU is counted, and layers fork from it regardless",
        _seed_model_parallel,
    ),
    # Optimizer.
    Patch(
        "nemo.collections.nlp.models.language_modeling.megatron_base_model",
        "MegatronBaseModel.configure_optimizers",
        NEMO,
        "with O2, only torch.cuda.synchronize() waits for the reduction of gradients: a race on gloo",
        _synchronous_gradients,
    ),
    # Kernels of Apex and Transformer Engine.
    Patch(f"{_COMMON}.clip_grads", "amp_C", NEMO, _KERNELS, lambda _: MultiTensor, missing=True),
    Patch(f"{_MCORE_OPTIM}.clip_grads", "l2_norm_impl", MEGATRON, _KERNELS, lambda _: multi_tensor_l2norm),
    *(
        Patch(f"{_MCORE_OPTIM}.{module}", "multi_tensor_scale_impl", MEGATRON, _KERNELS, _scale_in_torch)
        for module in ("clip_grads", "optimizer")
    ),
    *(
        Patch(module, "Adam", MEGATRON, _KERNELS, _adam_of_torch)
        for module in (f"{_MCORE_OPTIM}.distrib_optimizer", _MCORE_OPTIM)
    ),
)
"""Every symbol that CUDA would have to be there for."""
