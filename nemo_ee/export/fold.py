# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Translators as the MLP of one more Llama layer, from which arg-maxima follow exactly and logits up to a factor.

An exit's state is T norm(x) + b, or that and MLP(x). A Llama layer whose attention gives nothing computes x + MLP'(x),
and its MLP' has gates: where a gate's weight is 0 and its bias `GATE`, silu(GATE) = GATE to the last bit, and the unit
is linear in its input. H such units are T, the down projection's bias is b, and the exit's own MLP is the other units.
All of it is `UP` x `DOWN` = 2^30 times as large as the exit's state, so that x vanishes beside it, and the model's last
norm divides by that: what is left is the state divided by its root mean square, one positive factor per token. All
factors are powers of two, which change no digit; they lie on both projections, so that 8-bit formats hold them, but
float16 has no such numbers.

Every layer of a Llama has one width of MLPs, so the others get units of zeros.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from nemo_ee.checkpoint.stored_tensors import StoredTensor
from nemo_ee.export.llama_weights import Weights

GATE = 32.0
"""Of a linear unit: sigmoid(32) is 1 - 1e-14, which is 1 in float32."""
UP, DOWN = 2.0**10, 2.0**20


def made(shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]) -> StoredTensor:
    """A tensor that is computed in float32 when it is asked for."""
    return StoredTensor(shape, dtype, make)


def filled(like: StoredTensor, value: float, *shape: int) -> StoredTensor:
    """A tensor of one number, in the dtype of another."""
    return made(shape, like.dtype, lambda: torch.full(shape, value))


def still_attention(number: int, like: Weights) -> Weights:
    """Attention of layer `number` that gives nothing, in the shapes of the first layer's."""
    first, mine = "model.layers.0.", f"model.layers.{number}."
    names = [name for name in like if name.startswith((f"{first}self_attn.", f"{first}input_layernorm."))]
    return {
        name.replace(first, mine): filled(like[name], float("layernorm" in name), *like[name].shape)
        for name in names
    }


def folded_mlp(number: int, linear: Weights, norm: StoredTensor, mlp: Weights | None) -> Weights:
    """The MLP of layer `number` that is a translator and perhaps an MLP beside it.

    Args:
        number: of the layer, from 0.
        linear: the translator's `weight` [H, H] and `bias` [H].
        norm: gain [H] of the norm before the translator.
        mlp: the MLP's `norm` [H], `gate` and `up` [F, H], `down` [H, F]; None where there is none.

    Returns:
        Its norm, its projections of F + H units and their biases.
    """
    hidden, dtype = norm.shape[0], norm.dtype
    units = hidden if mlp is None else hidden + mlp["gate"].shape[0]

    def beside(name: str, factor: float, own: Callable[[], Tensor], dim: int = 0) -> Tensor:
        """The MLP's part, its norm's gain within, before the translator's."""
        if mlp is None:
            return own()
        part = mlp[name].read().float() * factor
        part = part if name == "down" else part * mlp["norm"].read().float()
        return torch.cat((part, own()), dim)

    def translator() -> Tensor:
        return linear["weight"].read().float() * norm.read().float() * (UP / GATE)

    def gate_bias() -> Tensor:
        return torch.cat((torch.zeros(units - hidden), torch.full((hidden,), GATE)))

    layer = f"model.layers.{number}."
    wide = (units, hidden)
    return {
        f"{layer}post_attention_layernorm.weight": filled(norm, 1.0, hidden),
        f"{layer}mlp.gate_proj.weight": made(
            wide, dtype, lambda: beside("gate", 1.0, lambda: torch.zeros(hidden, hidden))
        ),
        f"{layer}mlp.gate_proj.bias": made((units,), dtype, gate_bias),
        f"{layer}mlp.up_proj.weight": made(wide, dtype, lambda: beside("up", UP, translator)),
        f"{layer}mlp.up_proj.bias": filled(norm, 0.0, units),
        f"{layer}mlp.down_proj.weight": made(
            (hidden, units), dtype, lambda: beside("down", DOWN, lambda: DOWN * torch.eye(hidden), 1)
        ),
        f"{layer}mlp.down_proj.bias": made(
            (hidden,), dtype, lambda: linear["bias"].read().float() * (UP * DOWN)
        ),
    }


def widened(weights: Weights, units: int) -> Weights:
    """All MLPs with as many units, of which new ones give nothing, and with biases."""
    out = dict(weights)
    for name, tensor in weights.items():
        if ".mlp." not in name or not name.endswith(".weight"):
            continue
        dim = 1 if "down_proj" in name else 0
        if more := units - tensor.shape[dim]:
            out[name] = _padded(tensor, dim, more)
        bias = name.replace(".weight", ".bias")
        rows = out[name].shape[0]
        old = weights.get(bias, filled(tensor, 0.0, rows))
        out[bias] = _padded(old, 0, more) if (more := rows - old.shape[0]) else old
    return out


def _padded(tensor: StoredTensor, dim: int, more: int) -> StoredTensor:
    shape = list(tensor.shape)
    shape[dim] = more

    def read() -> Tensor:
        whole = tensor.read()
        return torch.cat((whole, whole.new_zeros(shape)), dim)

    full = list(tensor.shape)
    full[dim] += more
    return replace(tensor, shape=tuple(full), read=read)
