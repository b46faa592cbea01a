# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Weights as functions: all kinds against the matrix product, and whole models with them."""

from contextlib import contextmanager

import pytest
import torch

from nemo_ee.decoding.cpu.cpu_kernels import SWITCH
from nemo_ee.decoding.cpu.lean_weights import INT8_TOKENS, DenseLinear, EightBitLinear, lean_linear
from nemo_ee.decoding.layers.lean_head import LeanHead
from tests.support.drafting import drafting_eagerly
from tests.support.tiny_gpt import HEADS, tiny_model, tiny_model_config
from tests.unit.test_decode import PROMPTS

COUNTS = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 48, 49, 65]


@pytest.fixture(scope="module")
def weight():
    return torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) / 8


@pytest.fixture(params=["1", "0"], ids=["our kernels", "torch's"])
def kernels(request, monkeypatch):
    monkeypatch.setenv(SWITCH, request.param)
    return request.param == "1"


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def one_dnn(request, monkeypatch):
    monkeypatch.setattr("nemo_ee.decoding.cpu.lean_weights.one_dnn_is_faster", lambda: request.param)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("features", [48, 91])
@pytest.mark.parametrize("count", COUNTS)
def test_weights_as_they_are_give_the_product(count, features, with_bias, kernels, one_dnn):
    generator = torch.Generator().manual_seed(count)
    weight = torch.randn(features, 67, generator=generator) / 8
    bias = torch.randn(features, generator=generator) if with_bias else None
    x, residual = (
        torch.randn(count, 67, generator=generator),
        torch.randn(count, features, generator=generator),
    )
    expected = x @ weight.t() + (0 if bias is None else bias)
    layer, kept = lean_linear(weight, bias, torch.float32), residual.clone()
    assert bool(layer.kernels) == kernels
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert torch.allclose(layer.onto(residual, x), residual + expected, atol=1e-5)
    assert torch.allclose(layer(x.t().contiguous().t()), expected, atol=1e-5), "any layout of the input"
    assert residual.equal(kept), "inputs stay as they are"


@pytest.mark.parametrize("count", COUNTS)
def test_bfloat16_weights_give_the_product_of_the_rounded_ones(weight, count):
    x = torch.randn(count, 64, generator=torch.Generator().manual_seed(count))
    rounded = weight.to(torch.bfloat16).float()
    layer = lean_linear(weight, None, torch.float32, "bf16")
    assert layer.bytes * 2 == lean_linear(weight, None, torch.float32).bytes
    assert torch.allclose(layer(x), x @ rounded.t(), atol=1e-5)
    assert not torch.allclose(layer(x), x @ weight.t(), atol=1e-4)
    exact = lean_linear(rounded, None, torch.float32, "bf16")
    assert exact.weight.data_ptr() == rounded.data_ptr(), "no copy where nothing is rounded"


@pytest.mark.parametrize("count", COUNTS)
def test_eight_bits_err_by_their_rounding(weight, count, kernels):
    x = torch.randn(count, 64, generator=torch.Generator().manual_seed(count))
    layer, exact = lean_linear(weight, None, torch.float32, "int8"), x @ weight.t()
    assert layer.bytes * 4 == lean_linear(weight, None, torch.float32).bytes
    difference = (layer(x) - exact).abs()
    if count > INT8_TOKENS:
        assert difference.max() < 1e-5
        return
    # Half a step per weight at most, and a little at the clamp; torch rounds x, scales and sums to bfloat16 (2^-8).
    bound = x.abs().sum(1)[:, None] * (weight.abs().amax(1) / 127) * 0.52
    coarse = 2**-9 if kernels else 2**-7
    bound = bound + coarse * (x.abs() @ weight.abs().t())
    assert (difference <= bound).all() and difference.max() > 1e-4
    quantised = x @ (layer.quantised.float() * layer.scales.float()[:, None]).t()
    if kernels:
        assert torch.allclose(layer(x), quantised, atol=1e-5), "nothing but the weights is rounded"


def test_what_a_kind_cannot_do_is_refused(weight):
    with pytest.raises(NotImplementedError, match="weights=bf16"):
        lean_linear(weight, None, torch.bfloat16, "bf16")
    with pytest.raises(NotImplementedError, match="weights=int8"):
        lean_linear(weight.to("meta"), None, torch.float32, "int8")


@pytest.fixture(scope="module")
def model():
    config = tiny_model_config(
        head=HEADS["block, MLP, linear, untied"], share_embeddings_and_output_weights=False
    )
    return tiny_model(config)


def generated(model, **early_exit):
    ids = torch.zeros(len(PROMPTS), 12, dtype=torch.long)
    for row, prompt in zip(ids, PROMPTS, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    lengths = torch.tensor([len(prompt) for prompt in PROMPTS])
    return model.generate((ids, lengths), dict(max_length=24), dict(add_BOS=False), early_exit=early_exit)


@contextmanager
def rounded_beforehand(model):
    """What `weights=bf16` rounds: matrices of the layers, of heads' blocks and of the output layer."""
    kept = {name: weight.detach().clone() for name, weight in model.gpt.named_parameters()}
    with torch.no_grad():
        for name, weight in model.gpt.named_parameters():
            of_layer = "decoder.layers" in name or ".block." in name or name.startswith("output_layer.")
            if weight.dim() > 1 and of_layer:
                weight.copy_(weight.to(torch.bfloat16))
    yield
    with torch.no_grad():
        for name, weight in model.gpt.named_parameters():
            weight.copy_(kept[name])


@pytest.mark.parametrize(
    "early_exit", [dict(threshold=0.5, always=True), dict(threshold=0.5, lossless=True)], ids=str
)
def test_a_model_decodes_with_bfloat16_and_eight_bit_weights(model, early_exit):
    """Exits' heads are in 8 bits of what they are in either case, so that they are as sure."""
    unprepared = generated(model, **early_exit)["token_ids"]
    try:
        model.prepare_decoding()
        native = generated(model, **early_exit)["token_ids"]
        model.prepare_decoding("bf16")
        halved = generated(model, **early_exit)
        with rounded_beforehand(model):
            model.prepare_decoding("native")
            rounded = generated(model, **early_exit)
        model.prepare_decoding("int8")
        coarse = generated(model, **early_exit)["token_ids"]
    finally:
        model.release_decoding()
    assert rounded["token_ids"] == halved["token_ids"] != native
    for one, other in zip(rounded["early_exit"], halved["early_exit"], strict=True):
        assert one["exit_layers"] == other["exit_layers"]
        assert one["confidences"] == pytest.approx(other["confidences"], rel=1e-3)
    assert coarse != native and [len(row) for row in coarse] == [len(row) for row in native]
    same = sum(
        a == b for one, other in zip(coarse, native, strict=True) for a, b in zip(one, other, strict=True)
    )
    assert same > 0.3 * sum(map(len, native))
    assert generated(model, **early_exit)["token_ids"] == unprepared


def test_eight_bit_heads_are_asked_and_draft_where_decoding_is_prepared(model):
    native, calls = generated(model, threshold=1.0)["token_ids"], []
    predict = LeanHead.predict

    def noted(head, x):
        calls.append(type(head.projection))
        return predict(head, x)

    model.prepare_decoding()
    try:
        with drafting_eagerly(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(LeanHead, "predict", noted)
            drafted = generated(model, threshold=0.0, lossless=True)
            generated(model, threshold=0.0, always=True)
            assert set(calls) == {EightBitLinear}
            model.release_decoding()
            generated(model, threshold=0.0, always=True)
            assert calls[-1] is DenseLinear
    finally:
        model.release_decoding()
    assert drafted["token_ids"] == native
    assert sum(each["drafts"] for each in drafted["early_exit"]) > 0


def test_prepared_weights_stay_until_they_are_released(model):
    from nemo_ee.errors import ConfigError

    before = generated(model, threshold=1.0)["token_ids"]
    model.prepare_decoding("bf16")
    weight = model.gpt.decoder.layers[3].mlp.linear_fc2.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(-1)
        model.release_decoding()
        assert generated(model, threshold=1.0)["token_ids"] != before
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    with pytest.raises(ConfigError, match="did you mean int8"):
        model.prepare_decoding("int4")
