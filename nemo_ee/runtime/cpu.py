# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Run NeMo's Megatron GPT stack on a machine without CUDA, Apex or Transformer Engine.

This is the only file of the package that changes other packages at run time, and only when `enable` is
called. `PATCHES` lists every change: the upstream symbol, the release it was checked against, why, and what
replaces it.

How it works:

1. Symbols of torch are replaced at once. NeMo and Megatron write ``device="cuda"``, ``.cuda()`` and
   ``torch.cuda.current_device()`` literally; here they all mean the CPU, and ``.cuda()`` returns the tensor
   itself, as it does on a GPU for a tensor that is already there.
2. Symbols of Lightning, Megatron and NeMo are replaced right after the module that defines them has been
   executed, by an import hook. `enable` itself therefore imports torch and nothing else, and code that
   imports *from* a patched module sees the replacement.

Only the replaced functions pay: 0.7 to 1 microsecond more per call of a tensor factory, ``Tensor.to`` and
``Tensor.type``. Matrix products, views and arithmetic run untouched, in every thread, so a decode loop needs
no way around the runtime. A `torch.overrides.TorchFunctionMode` would take less code, but adds 1.5 to 5
microseconds to *every* torch call and holds only in the thread that entered it.
"""

import functools
import importlib
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TORCH = "torch 2.13.0"
LIGHTNING = "lightning 2.4.0"
MEGATRON = "megatron-core 0.13.1"
NEMO = "nemo-toolkit 2.4.1"

ENVIRONMENT = {
    # MegatronBaseModel._enable_nvidia_optimizations (nemo-toolkit 2.4.1) matches a regular expression
    # against this variable without asking whether it is set, and fails with a TypeError outside NVIDIA's
    # containers.
    "NVIDIA_PYTORCH_VERSION": "",
}
"""Environment variables that `enable` sets where they are unset, so that child processes inherit them."""


@dataclass(frozen=True)
class Patch:
    """One change to an upstream package.

    Attributes:
        module: the upstream module.
        name: the attribute of that module, dotted for a member of a class.
        upstream: package and release that the change was checked against.
        reason: why the symbol cannot stay as it is.
        replacement: called with the original (None where there is none); returns what takes its place.
        missing: True for a name that the module uses and may not have, because the ``import apex`` that
            defines it failed.
    """

    module: str
    name: str
    upstream: str
    reason: str
    replacement: Callable[[Any], Any]
    missing: bool = False

    @property
    def target(self) -> str:
        """The patched symbol as a dotted path."""
        return f"{self.module}.{self.name}"

    def apply(self) -> None:
        """Replaces the symbol in its module, which must be imported.

        Raises:
            AttributeError: the symbol does not exist; the installed release is not one this table was
                checked against.
        """
        owner: Any = sys.modules[self.module]
        *path, name = self.name.split(".")
        for part in path:
            owner = getattr(owner, part)
        if not self.missing and not hasattr(owner, name):
            raise AttributeError(
                f"{self.target} does not exist; nemo_ee's CPU runtime was checked against {self.upstream}"
            )
        setattr(owner, name, self.replacement(getattr(owner, name, None)))


def enable() -> bool:
    """Makes CUDA calls of NeMo and Megatron mean the CPU, in this process and those it forks.

    Call it before anything imports NeMo's ``nlp`` collection or megatron-core, once per process; more calls
    do nothing. Where CUDA is available it prints one line and changes nothing.

    Returns:
        True if the CPU runtime is on (now or since an earlier call), False if CUDA is available.

    Raises:
        RuntimeError: megatron-core or NeMo's nlp collection is imported already, so that they hold
            unpatched symbols.
    """
    import torch

    if _finder in sys.meta_path:
        return True
    if torch.cuda.is_available():
        print("nemo_ee.runtime.cpu: CUDA is available, so the CPU runtime stays off and nothing is changed.")
        return False
    too_early = sorted({"megatron.core", "nemo.collections.nlp"} & sys.modules.keys())
    if too_early:
        raise RuntimeError(
            f"{', '.join(too_early)} imported before nemo_ee.runtime.cpu.enable(); call enable() first"
        )

    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    _remember_factories()
    sys.meta_path.insert(0, _finder)
    for module in _finder.modules:
        if module in sys.modules or module.partition(".")[0] == "torch":
            importlib.import_module(module)
            _finder.apply(module)
    return True


class _PatchingFinder(importlib.abc.MetaPathFinder):
    """Lets the usual finders locate a module of `PATCHES` and patches it once it has been executed."""

    def __init__(self, patches: tuple[Patch, ...]):
        self.modules: dict[str, list[Patch]] = {}
        for patch in patches:
            self.modules.setdefault(patch.module, []).append(patch)
        self._searching = False

    def apply(self, module: str) -> None:
        for patch in self.modules[module]:
            patch.apply()

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.modules or self._searching:
            return None
        self._searching = True  # find_spec below asks every finder again, this one included
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_patch(module):
            execute(module)
            self.apply(fullname)

        spec.loader.exec_module = execute_and_patch  # this loader object serves this one module
        return spec


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


def _remember_factories() -> None:
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
            logging.info(
                "CPU runtime: model.async_grad_allreduce=False, as nothing here waits for it to finish"
            )
            with open_dict(self.cfg):
                self.cfg.async_grad_allreduce = False
        return original(self)

    return functools.wraps(original)(configure_optimizers)


# --- what Apex would provide ----------------------------------------------------------------------


def _from(module: str, name: str) -> Callable[[Any], Any]:
    """The original, or else a stand-in found in another module, imported when the patch is applied."""
    return lambda original: original or getattr(importlib.import_module(module), name)


def _listify_model(original):
    return original or (lambda model: model if isinstance(model, list) else [model])


class _MultiTensor:
    """The part of Apex's ``amp_C`` that NeMo's gradient clipping uses, through `_apply_multi_tensor`."""

    @staticmethod
    def multi_tensor_l2norm(tensor_lists, per_tensor: bool):
        import torch

        norms = torch.stack([tensor.float().norm() for tensors in tensor_lists for tensor in tensors])
        return norms.norm().reshape(1), (norms if per_tensor else None)


def _apply_multi_tensor(original):
    return lambda operation, overflow_buffer, tensor_lists, *args: operation(tensor_lists, *args)


# --- the table ------------------------------------------------------------------------------------

_FACTORIES = (
    "arange as_tensor empty empty_like eye full full_like linspace ones ones_like "
    "rand rand_like randint randn randn_like randperm tensor zeros zeros_like"
).split()
_TENSOR_TYPES = [f"{kind}Tensor" for kind in "BFloat16 Bool Byte Double Float Half Int Long".split()]


def _no_class(original):
    return original or type("Never", (), {})  # NeMo only asks whether an optimizer is one


_COMMON = "nemo.collections.nlp.modules.common.megatron"
_OVERRIDES = "nemo.collections.nlp.parts.nlp_overrides"
_APEX_IMPORT = "imported from Apex, used without asking whether the import worked"

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
    # Compilation.
    Patch(
        "megatron.core.jit",
        "jit_fuser",
        MEGATRON,
        "is torch.compile, which needs a C++ compiler on a CPU and takes longer there than it saves",
        lambda original: lambda function: function,
    ),
    # Optimizer.
    Patch(
        "nemo.collections.nlp.models.language_modeling.megatron_base_model",
        "MegatronBaseModel.configure_optimizers",
        NEMO,
        "with O2, only torch.cuda.synchronize() waits for the reduction of gradients: a race on gloo",
        _synchronous_gradients,
    ),
    # Apex. The flags guard ordinary torch code in NLPDDPStrategy and in the O2 optimizer.
    Patch(_OVERRIDES, "HAVE_APEX", NEMO, "strategies refuse to start", lambda _: True),
    Patch(
        "nemo.core.optim.optimizer_with_main_params", "HAVE_APEX", NEMO, "O2 refuses to start", lambda _: True
    ),
    Patch(
        f"{_COMMON}.build_model",
        "set_defaults_if_not_set_tensor_model_parallel_attributes",
        NEMO,
        _APEX_IMPORT,
        _from(
            "megatron.core.tensor_parallel.layers",
            "set_defaults_if_not_set_tensor_model_parallel_attributes",
        ),
        missing=True,
    ),
    Patch(
        _OVERRIDES,
        "McoreDistributedOptimizer",
        NEMO,
        _APEX_IMPORT,
        _from("nemo.core.optim.mcore_optim", "McoreDistributedOptimizer"),
        missing=True,
    ),
    Patch(_OVERRIDES, "MegatronDistributedFusedAdam", NEMO, _APEX_IMPORT, _no_class, missing=True),
    Patch(f"{_COMMON}.utils", "listify_model", NEMO, _APEX_IMPORT, _listify_model, missing=True),
    *(
        Patch(f"{_COMMON}.utils", name, NEMO, _APEX_IMPORT, _from("torch.nn", norm), missing=True)
        for name, norm in (
            ("FusedLayerNorm", "LayerNorm"),
            ("FastLayerNorm", "LayerNorm"),
            ("MixedFusedRMSNorm", "RMSNorm"),
        )
    ),
    # These two are replaced where Apex is installed, too: its kernels take CUDA tensors alone.
    Patch(
        f"{_COMMON}.clip_grads", "multi_tensor_applier", NEMO, _APEX_IMPORT, _apply_multi_tensor, missing=True
    ),
    Patch(f"{_COMMON}.clip_grads", "amp_C", NEMO, _APEX_IMPORT, lambda _: _MultiTensor, missing=True),
)
"""Every change that `enable` makes to another package."""

_finder = _PatchingFinder(PATCHES)
