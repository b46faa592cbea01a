# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""GELU on a CPU is what megatron-core's fused kernel computes for the same checkpoint on a GPU."""

import math

import pytest
import torch
from torch.nn.functional import gelu

from nemo_ee.decoding.cpu.kernels.mlp import GELU, SILU, TANH_GELU
from nemo_ee.decoding.decoding_model import DecodingModel
from nemo_ee.modeling.activations import tanh_gelu
from tests.support.tiny_gpt import tiny_model, tiny_model_config

CASES = {
    "fused": (dict(activation="gelu", bias=True, bias_activation_fusion=True), tanh_gelu, TANH_GELU),
    "fused by default": (
        dict(activation="gelu", bias=True, bias_activation_fusion=None),
        tanh_gelu,
        TANH_GELU,
    ),
    "fused, gated": (dict(activation="geglu", bias_activation_fusion=True), tanh_gelu, TANH_GELU),
    "not fused": (dict(activation="gelu", bias=True, bias_activation_fusion=False), gelu, GELU),
    "another activation": (dict(activation="swiglu", bias_activation_fusion=True), None, SILU),
}


def test_the_approximation_is_megatrons():
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    fused = x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x)))
    torch.testing.assert_close(tanh_gelu(x), fused)
    assert (tanh_gelu(x) - gelu(x)).abs().max() > 4e-4


@pytest.mark.parametrize("case", CASES)
def test_fused_gelu_stays_approximate_without_the_kernel(case):
    settings, function, number = CASES[case]
    config = tiny_model_config(**settings)
    if settings["bias_activation_fusion"] is None:
        del config.bias_activation_fusion
    model = tiny_model(config)
    assert not model.gpt.config.bias_activation_fusion
    assert function is None or model.gpt.config.activation_func is function
    with torch.inference_mode():
        layer = DecodingModel(model.gpt).layers[1]
    assert {kernel.activation for _, kernel in layer.kernels} == {number}
