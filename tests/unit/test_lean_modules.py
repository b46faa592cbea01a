# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Layers of Transformer Engine's modules decode through their weights, to what the modules themselves compute."""

import pytest
import torch

from tests.support.tiny_gpt import GPT3, HEADS, tiny_model, tiny_model_config
from tests.support.transformer_engine import tiny_te_model, transformer_engine
from tests.support.uncached import generate_uncached

EVERYTHING = HEADS["block, MLP, linear, untied"]
BACKBONES = {
    "RMSNorm, gated, grouped queries": {},
    "RMSNorm, zero-centred, norms of heads": dict(layernorm_zero_centered_gamma=True, qk_layernorm=True),
    "GPT-3": GPT3,
    "LayerNorm, no biases, norms of heads": dict(normalization="layernorm", qk_layernorm=True),
    "LayerNorm, biases, gated, one group": dict(normalization="layernorm", bias=True, num_query_groups=1),
}
PROMPTS = [[7, 8, 9, 20, 33], [41], [100, 7, 55, 56, 57, 58, 59, 60]]
EXITS = {2: 0.5, 4: 0.4, 6: 0.5}


@pytest.fixture(scope="module", autouse=True)
def _transformer_engine():
    with transformer_engine():
        yield


def config_of(backbone, **overrides):
    return tiny_model_config(
        head=EVERYTHING, **{"share_embeddings_and_output_weights": False, **BACKBONES[backbone], **overrides}
    )


@pytest.fixture(scope="module", params=BACKBONES)
def gpt(request):
    return tiny_te_model(config_of(request.param), dtype=torch.float64).gpt


def greedy(gpt, prompts, steps=16):
    """Tokens and exits of a batch; and the decoding model."""
    from nemo_ee.decoding.decoder import EarlyExitDecoder
    from nemo_ee.decoding.decoding_model import DecodingModel

    with torch.inference_mode():
        model = DecodingModel(gpt)
        decoder = EarlyExitDecoder(model, list(EXITS), len(prompts), 40)
        step, out = decoder.prefill(prompts), []
        for _ in range(steps):
            tokens = step.greedy_tokens()
            out.append((tokens.tolist(), step.exit_layers))
            step = decoder.step(tokens, [list(EXITS.values())] * len(prompts))
    return [([t[i] for t, _ in out], [n[i] for _, n in out]) for i in range(len(prompts))], model


def all_layers(model):
    return [*model.layers.values(), *model.blocks.values()]


def test_layers_of_transformer_engine_are_read_and_decode_as_they_compute(gpt):
    from megatron.core.extensions import transformer_engine as te

    from nemo_ee.decoding.cpu.lean_weights import LeanNorm
    from nemo_ee.decoding.layers.lean_layer import LeanLayer

    layer = gpt.decoder.layers[0]
    assert type(layer.self_attention.linear_qkv) is te.TELayerNormColumnParallelLinear
    assert type(gpt.exits["4"].block.mlp.linear_fc2) is te.TERowParallelLinear
    found, model = greedy(gpt, PROMPTS)
    for prompt, (tokens, exit_layers) in zip(PROMPTS, found, strict=True):
        reference = generate_uncached(gpt, prompt, 16, EXITS)
        assert (tokens, exit_layers) == (reference.tokens, reference.exit_layers)
    assert len({n for _, layers in found for n in layers}) > 1, "some leave early, some do not"
    assert all(type(layer) is LeanLayer for layer in all_layers(model)) and len(model.blocks) == 3
    assert type(model.output.norm) is LeanNorm


def test_each_half_of_a_layer_is_what_its_modules_compute(gpt):
    from nemo_ee.decoding.layers.lean_layer import LeanLayer, ModuleLayer

    generator = torch.Generator().manual_seed(0)
    for layer in (gpt.decoder.layers[2], gpt.exits["2"].block):
        lean, modules = LeanLayer(layer, torch.float64), ModuleLayer(layer)
        x = torch.randn(5, 64, generator=generator, dtype=torch.float64)
        attended = torch.randn(5, 64, generator=generator, dtype=torch.float64)
        with torch.inference_mode():
            assert torch.allclose(lean.project(x), modules.project(x), rtol=1e-12, atol=1e-12)
            assert torch.allclose(
                lean.finish(x, attended), modules.finish(x, attended), rtol=1e-12, atol=1e-12
            )


@pytest.mark.parametrize("backbone", ["RMSNorm, zero-centred, norms of heads", "GPT-3"])
def test_the_same_weights_in_modules_of_torch_give_the_same_tokens(backbone):
    found, _ = greedy(tiny_te_model(config_of(backbone), dtype=torch.float64).gpt, PROMPTS)
    expected, _ = greedy(tiny_model(config_of(backbone), dtype=torch.float64).gpt, PROMPTS)
    assert found == expected


@pytest.mark.parametrize("zero_centred", [False, True])
@pytest.mark.parametrize("normalization", ["rmsnorm", "layernorm"])
def test_norms_in_bfloat16_round_where_the_kernels_round(normalization, zero_centred):
    from nemo_ee.decoding.layers.lean_modules import norm_before, read_norm

    model = tiny_te_model(
        tiny_model_config(normalization=normalization, layernorm_zero_centered_gamma=zero_centred)
    )
    fused, alone = model.gpt.decoder.layers[1].mlp.linear_fc1, model.gpt.decoder.final_layernorm
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 64, generator=generator).to(torch.bfloat16)
    gain = 0.003 * (1 + torch.randn(64, generator=generator).abs()) + (0.0 if zero_centred else 1.0)
    with torch.no_grad():
        for weight in (fused.layer_norm_weight, alone.weight):
            weight.copy_(gain)
        if normalization == "layernorm":
            for bias in (fused.layer_norm_bias, alone.bias):
                bias.copy_(0.1 * torch.randn(64, generator=generator))
    weight = gain.to(torch.bfloat16).double() + zero_centred
    wide = x.double() - (x.double().mean(-1, keepdim=True) if normalization == "layernorm" else 0)
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    model.gpt.to(torch.bfloat16)
    for module, norm in ((alone, read_norm(alone)), (fused, norm_before(None, fused))):
        bias = (
            None
            if normalization == "rmsnorm"
            else getattr(module, "bias" if module is alone else "layer_norm_bias")
        )
        exact = (expected if bias is None else expected + bias.double()).to(torch.bfloat16)
        out = norm(x)
        assert out.dtype == torch.bfloat16
        assert (out == exact).float().mean() > 0.99, "the gain is rounded nowhere but in the weight"
        if module is alone:
            assert (out == alone(x)).float().mean() > 0.99


def test_layers_in_fp8_run_through_their_modules():
    from nemo_ee.decoding.decoding_model import DecodingModel
    from nemo_ee.decoding.layers.lean_layer import LeanLayer, ModuleLayer

    gpt = tiny_te_model(config_of("GPT-3")).gpt
    gpt.decoder.layers[2].mlp.linear_fc2.primary_weights_in_fp8 = True
    gpt.decoder.layers[3].self_attention.linear_qkv.primary_weights_in_fp8 = True
    kinds = {n: type(layer) for n, layer in DecodingModel(gpt).layers.items()}
    assert [n for n, kind in kinds.items() if kind is ModuleLayer] == [3, 4]
    assert kinds[5] is LeanLayer
    with pytest.raises(NotImplementedError, match="weights=bf16: some layer has modules .*FP8"):
        DecodingModel(gpt, weights="bf16")
    found, _ = greedy(gpt.double(), PROMPTS)
    for prompt, (tokens, exit_layers) in zip(PROMPTS, found, strict=True):
        reference = generate_uncached(gpt, prompt, 16, EXITS)
        assert (tokens, exit_layers) == (reference.tokens, reference.exit_layers)
    gpt.config.fp8 = "hybrid"
    assert all(type(layer) is ModuleLayer for layer in DecodingModel(gpt).layers.values())


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_other_kinds_of_weights_are_made_of_transformer_engines(weights):
    from nemo_ee.decoding.decoding_model import DecodingModel

    config = config_of("RMSNorm, gated, grouped queries")
    of_te, of_torch = (DecodingModel(make(config).gpt, weights) for make in (tiny_te_model, tiny_model))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for one, other in zip(all_layers(of_te), all_layers(of_torch), strict=True):
        assert one.project(x).equal(other.project(x)) and one.bytes == other.bytes


def test_graphs_are_captured_for_transformer_engine(monkeypatch):
    from nemo_ee.decoding.cuda import segment_graphs
    from nemo_ee.decoding.decoding_model import DecodingModel

    model = DecodingModel(tiny_te_model(config_of("GPT-3")).gpt)
    monkeypatch.setattr(segment_graphs, "CudaCapture", lambda device: f"graphs on {device}")
    model.device = torch.device("cuda")
    assert segment_graphs.capture_for(model) == "graphs on cuda"
