# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Transformer Engine's modules in plain torch, for megatron-core's own classes to be built on.

Transformer Engine needs a GPU even to be imported. What decoding reads of it are names: of modules, of their
parameters and of what says how to use these. Each has here the name that it has in Transformer Engine 2.5.0, with
its place in that release's `transformer_engine/pytorch/`; the forward passes are its mathematics. megatron-core's
`extensions/transformer_engine.py` is executed anew on top of them, so that the classes between are the real ones.
"""

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import megatron.core.utils
import pytest
import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from nemo_ee.modeling.gpt import EarlyExitGPTModel
from nemo_ee.modeling.specs import FUSED_NORM_NAMES

VERSION = "2.5.0"
REBUILT = (
    "megatron.core.extensions.transformer_engine",
    "megatron.core.extensions.transformer_engine_spec_provider",
    "megatron.core.models.gpt.gpt_layer_specs",
)
"""megatron-core's modules that look for Transformer Engine where they are imported."""


class BaseModule(torch.nn.Module):
    """`TransformerEngineBaseModule`, module/base.py:560."""

    def __init__(self):
        super().__init__()
        self.primary_weights_in_fp8 = False  # module/base.py:579

    def activation_dtype(self, x: Tensor) -> torch.dtype:
        """`set_activation_dtype`, module/base.py:879."""
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        for name, parameter in self.named_parameters():
            assert x.dtype == parameter.dtype, name
        return x.dtype

    def make_weights(
        self,
        out_features: int,
        in_features: int,
        bias: bool,
        mode: str,
        tp_size: int,
        init_method: Callable,
        like: dict[str, Any],
    ) -> None:
        """The parameters of a linear layer: module/linear.py:1118-1197 and module/layernorm_linear.py:1274-1355."""
        if mode == "column":  # module/linear.py:1039, module/layernorm_linear.py:1175
            out_features //= tp_size
        elif mode == "row":
            in_features //= tp_size
        self.weight_names, self.bias_names = ["weight"], ["bias"]
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, **like))
        init_method(self.weight)
        set_tensor_model_parallel_attributes(self.weight, True, 1 if mode == "row" else 0, 1)
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(out_features, **like))
            if mode == "column":  # module/linear.py:1243, module/layernorm_linear.py:1428
                set_tensor_model_parallel_attributes(self.bias, True, 0, 1)
        else:
            self.bias = torch.Tensor().to(**like)  # not None: module/linear.py:1197, layernorm_linear.py:1354

    def multiply(self, x: Tensor, dtype: torch.dtype) -> Any:
        """The product, and the bias where it is not applied: module/linear.py:1300-1375."""
        bias = self.bias.to(dtype)
        is_row = self.parallel_mode == "row"
        fused = self.apply_bias and not is_row  # `gemm_bias_unfused_add`, module/linear.py:1207
        out = linear(x.to(dtype), self.weight.to(dtype), bias if fused else None)
        if is_row and self.tp_size > 1:
            torch.distributed.all_reduce(out, group=self.tp_group)
        if self.apply_bias and is_row:
            out = out + bias
        return (out, bias) if self.return_bias else out


class Linear(BaseModule):
    """module/linear.py:897."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        **_: Any,
    ):
        super().__init__()
        self.use_bias, self.return_bias = bias, return_bias  # module/linear.py:1010
        self.apply_bias = bias and not return_bias
        self.parallel_mode, self.tp_size, self.tp_group = parallel_mode, tp_size, tp_group
        self.sequence_parallel = tp_size > 1 and sequence_parallel
        like = dict(dtype=params_dtype, device=device)
        self.make_weights(out_features, in_features, bias, parallel_mode, tp_size, init_method, like)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        """[..., I] -> [..., O], and the bias if it is returned."""
        return self.multiply(inp, self.activation_dtype(inp))


class LayerNormLinear(BaseModule):
    """module/layernorm_linear.py:1012."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        init_method: Callable | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        zero_centered_gamma: bool = False,
        device: Any = "cuda",
        **_: Any,
    ):
        super().__init__()
        self.normalization = normalization  # module/layernorm_linear.py:1146
        self.use_bias, self.return_bias = bias, return_bias
        self.apply_bias = bias and not return_bias
        self.zero_centered_gamma, self.eps = zero_centered_gamma, eps  # :1153, :1232
        self.parallel_mode, self.tp_size, self.tp_group = parallel_mode, tp_size, tp_group
        self.sequence_parallel = tp_size > 1 and sequence_parallel
        like = dict(dtype=params_dtype, device=device)
        gain = torch.full([in_features], float(not zero_centered_gamma), **like)
        self.layer_norm_weight = torch.nn.Parameter(gain)  # :1237
        self.layer_norm_bias = None  # :1249
        if normalization != "RMSNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(in_features, **like))  # :1246
        self.make_weights(out_features, in_features, bias, parallel_mode, tp_size, init_method, like)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        """[..., I] -> [..., O], and the bias if it is returned."""
        dtype = self.activation_dtype(inp)
        rms = self.normalization == "RMSNorm"
        weights = self.layer_norm_weight, self.layer_norm_bias  # all cast, :151
        return self.multiply(normalise(inp, *weights, self.eps, rms, self.zero_centered_gamma, dtype), dtype)


class Norm(torch.nn.Module):
    """What both norms share."""

    rms: bool

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: Any = None,
    ):
        super().__init__()
        self.eps, self.zero_centered_gamma = (
            eps,
            zero_centered_gamma,
        )  # ops/basic/{rmsnorm,layer_norm}.py:79, 80
        like = dict(dtype=params_dtype, device=device)
        size = hidden_size if normalized_shape is None else normalized_shape
        self.weight = torch.nn.Parameter(torch.full([size], float(not zero_centered_gamma), **like))
        if not self.rms:
            self.bias = torch.nn.Parameter(torch.zeros(size, **like))
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H] in autocast's dtype or the weight's: ops/_common.py, `maybe_autocast_dtype`."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        bias = None if self.rms else self.bias
        return normalise(x, self.weight, bias, self.eps, self.rms, self.zero_centered_gamma, dtype)


class RMSNorm(Norm):
    """module/rmsnorm.py:16; `weight`, and no `bias`, ops/basic/rmsnorm.py:29."""

    rms = True


class LayerNorm(Norm):
    """module/layernorm.py:16; `weight` and `bias`, ops/basic/layer_norm.py:111."""

    rms = False


def normalise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    zero_centered: bool,
    dtype: torch.dtype,
) -> Tensor:
    """As the kernels (`rmsnorm_fwd`, `layernorm_fwd`): inputs in `dtype`, computed in float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    x, weight = x.to(dtype).to(wide), weight.to(dtype).to(wide)
    if not rms:
        x = x - x.mean(-1, keepdim=True)
    out = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (weight + zero_centered)
    return (out if bias is None else out + bias.to(dtype).to(wide)).to(dtype)


class DotProductAttention(torch.nn.Module):
    """attention/dot_product_attention/dot_product_attention.py:77: causal, in the layout sbhd."""

    def __init__(self, num_attention_heads: int, softmax_scale: float | None = None, **_: Any):
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **_: Any) -> Tensor:
        """[S, B, heads, D], [S, B, groups, D] twice -> [S, B, heads x D]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=k.shape[1] != q.shape[1]
        )
        return out.permute(2, 0, 1, 3).flatten(2)


def tiny_te_model(config: DictConfig, world_size: int = 1, dtype: torch.dtype | None = None) -> Any:
    """`tiny_model` of Transformer Engine's modules, with the weights of that of torch's; within `transformer_engine`.

    Args:
        config: from `tiny_model_config`.
        world_size: see `tiny_model`.
        dtype: see `tiny_model`.
    """
    from nemo_ee.models import megatron_gpt_early_exit_model as models
    from tests.support.tiny_gpt import tiny_model

    plain = tiny_model(config, world_size, dtype).gpt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            models, "EarlyExitGPTModel", lambda **named: EarlyExitGPTModel(**{**named, "use_te": True})
        )
        model = tiny_model(config, world_size, dtype)
    own = dict(model.gpt.named_parameters())
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            for separate, fused in FUSED_NORM_NAMES.items():
                if ".layers." in name or ".block." in name:
                    name = name.replace(separate, fused)
            own.pop(name).copy_(weight)
    assert not own, f"names that only Transformer Engine has: {list(own)}"
    return model


def _module(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(members)
    return module


def _package() -> dict[str, types.ModuleType]:
    """`transformer_engine` as megatron-core imports it."""
    recipe = _module("transformer_engine.common.recipe", DelayedScaling=type("DelayedScaling", (), {}))
    common = _module("transformer_engine.common", recipe=recipe)
    distributed = _module(
        "transformer_engine.pytorch.distributed", CudaRNGStatesTracker=type("CudaRNGStatesTracker", (), {})
    )
    pytorch = _module(
        "transformer_engine.pytorch",
        Linear=Linear,
        LayerNormLinear=LayerNormLinear,
        LayerNorm=LayerNorm,
        RMSNorm=RMSNorm,
        DotProductAttention=DotProductAttention,
        GroupedLinear=type("GroupedLinear", (BaseModule,), {}),
        ops=types.SimpleNamespace(Sequential=torch.nn.Sequential),
        distributed=distributed,
    )
    top = _module("transformer_engine", __version__=VERSION, common=common, pytorch=pytorch)
    return {module.__name__: module for module in (top, common, recipe, pytorch, distributed)}


@contextmanager
def transformer_engine() -> Iterator[None]:
    """megatron-core finds Transformer Engine within; specs with `use_te=True` then build its modules.

    What NeMo and megatron-core import is imported before: it would look for more, and remember what it found.
    """
    importlib.import_module("nemo_ee.models.megatron_gpt_early_exit_model")
    modules = [importlib.import_module(name) for name in REBUILT]
    before = [dict(vars(module)) for module in modules]
    package, version = _package(), megatron.core.utils._te_version
    assert not any(name in sys.modules for name in package), "stand-ins are for machines without the real one"
    sys.modules.update(package)
    megatron.core.utils._te_version = None
    try:
        for module in modules:
            importlib.reload(module)
        yield
    finally:
        for name in package:
            del sys.modules[name]
        megatron.core.utils._te_version = version
        for module, names in zip(modules, before, strict=True):
            vars(module).clear()
            vars(module).update(names)
