# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Heads in 8 bits: how far their confidence may be from the full head's, and that it depends on no neighbour.

A weight is off by half a step at most, 0.51 of max |row| / 127 with the scale's own rounding. From there logits are
bounded layer by layer, by intervals; and confidences p that belong to logits which differ by d at most differ by
tanh(d / 2) at most, since log(p / (1 - p)) differs by 2 d at most.
"""

import pytest
import torch

from tests.support.tiny_gpt import GPT3, HEADS, tiny_model, tiny_model_config

SILU_SLOPE, GELU_SLOPE = 1.1, 1.13
"""Of the activations, at most."""
HALF_STEP = 0.51


class Interval:
    """Vectors [N, H] and by how much each number may be off."""

    def __init__(self, centre, radius=None):
        self.centre, self.radius = centre, torch.zeros_like(centre) if radius is None else radius

    def __add__(self, other):
        return Interval(self.centre + other.centre, self.radius + other.radius)

    def times_eight_bits(self, weight, bias=None):
        step = HALF_STEP * weight.abs().amax(1) / 127
        reach = (self.centre.abs() + self.radius).sum(1, keepdim=True) * step
        centre = self.centre @ weight.T
        return Interval(centre if bias is None else centre + bias, self.radius @ weight.abs().T + reach)

    def inside_mlp(self, gated):
        if not gated:
            return Interval(torch.nn.functional.gelu(self.centre), GELU_SLOPE * self.radius)
        (gate, value), (of_gate, of_value) = self.centre.chunk(2, 1), self.radius.chunk(2, 1)
        active, off = torch.nn.functional.silu(gate), SILU_SLOPE * of_gate
        return Interval(active * value, active.abs() * of_value + off * (value.abs() + of_value))

    def normed(self, norm):
        """Of RMSNorm, or of LayerNorm, which is that of what is left without the mean."""
        out, centre, radius = norm(self.centre), self.centre, self.radius
        change = radius.norm(dim=1, keepdim=True) / radius.shape[1] ** 0.5
        if not norm.rms:
            centre, radius = centre - centre.mean(1, keepdim=True), radius + radius.mean(1, keepdim=True)
        length = centre.pow(2).mean(1, keepdim=True).add(norm.eps).sqrt()
        least = (length - change).clamp_min(1e-9)
        off = radius / length + (centre.abs() + radius) * change / (length * least)
        return Interval(out, off * (norm.weight + norm.zero_centered).abs())


def most_off(head, output_weight, hidden):
    """[N] by how much the confidence may be off."""
    x, mlp = Interval(hidden), None
    if head.mlp is not None:
        up, down = head.mlp.mlp.linear_fc1, head.mlp.mlp.linear_fc2
        inner = x.normed(head.mlp.norm).times_eight_bits(up.weight, up.bias)
        mlp = inner.inside_mlp(head.config.gated_linear_unit).times_eight_bits(down.weight, down.bias)
    if head.head.mlp == "residual":
        x = x + mlp
    x = x if head.norm is None else x.normed(head.norm)
    x = x if head.linear is None else x.times_eight_bits(head.linear.weight, head.linear.bias)
    if head.head.mlp == "beside":
        x = x + mlp
    projection = head.projection
    rows = output_weight if projection.weight is None else projection.weight
    off = x.times_eight_bits(rows).radius.amax(1)
    if projection.bucket_weight is not None:
        off = torch.maximum(off, x.radius @ projection.bucket_weight.abs())
    return (off / 2).tanh()


def heads_of(gpt):
    """For each exit: the module, the full head and the one in 8 bits."""
    from nemo_ee.decoding.decoding_model import DecodingModel

    full, eight = DecodingModel(gpt), DecodingModel(gpt, eight_bit_heads=True)
    return [(gpt.exits[str(n)], full.heads[n], eight.heads[n]) for n in gpt.exit_layers]


@pytest.mark.parametrize("overrides", [{}, GPT3], ids=["gated, RMSNorm", "GPT-3"])
@pytest.mark.parametrize("head", HEADS)
def test_confidences_are_off_by_what_rounding_weights_allows(head, overrides):
    """The worst case of intervals is far from what happens where they go through several matrices."""
    config = tiny_model_config(head=HEADS[head], share_embeddings_and_output_weights=False, **overrides)
    gpt = tiny_model(config, dtype=torch.float64).gpt
    hidden = torch.randn(24, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        for module, full, eight in heads_of(gpt):
            whole, rough = full.predict(hidden), eight.predict(hidden)
            off = (whole.confidence - rough.confidence).abs()
            emittable = whole.logits > float("-inf")
            apart = (whole.logits - rough.logits).where(emittable, 0.0).abs().amax(1)
            assert (off <= (apart / 2).tanh() + 1e-12).all()
            assert 0 < off.mean() < 0.02 and off.max() < 0.12
            assert eight.bytes * 8 <= full.bytes
            bound = most_off(module, gpt.output_weight(), hidden)
            assert (off <= bound).all()
            assert bound.max() < 0.5 or module.mlp is not None or module.linear is not None


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_heads_are_the_same_bits_whatever_weights_all_others_have(weights):
    from nemo_ee.decoding.decoding_model import DecodingModel

    config = tiny_model_config(
        head=HEADS["block, MLP, linear, untied"], share_embeddings_and_output_weights=False
    )
    gpt, hidden = tiny_model(config).gpt, torch.randn(30, 64, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        native, other = (DecodingModel(gpt, kind, eight_bit_heads=True) for kind in ("native", weights))
        assert type(native.output.projection) is not type(other.output.projection)
        for n, head in native.heads.items():
            assert torch.equal(head.predict(hidden[:3]).logits, other.heads[n].predict(hidden[:3]).logits)
            assert torch.equal(head.logits(hidden), other.heads[n].logits(hidden))


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["float32", "float64"])
def test_what_is_said_of_a_token_depends_on_no_other(dtype):
    config = tiny_model_config(
        head=HEADS["block, MLP, linear, untied"], share_embeddings_and_output_weights=False
    )
    gpt = tiny_model(config, dtype=dtype).gpt
    hidden = torch.randn(60, 64, generator=torch.Generator().manual_seed(4)).to(dtype or torch.float32)
    with torch.inference_mode():
        for _, full, eight in heads_of(gpt):
            alone = torch.cat([eight.predict(x[None]).confidence for x in hidden])
            for count in (2, 8, 9, 24, 25, 60):
                torch.testing.assert_close(
                    eight.predict(hidden[:count]).confidence, alone[:count], rtol=1e-4, atol=1e-6
                )
            off = (full.predict(hidden).confidence - alone).abs().max()
            assert off > 1e-4, "and not by the full weights"


def test_a_gpu_or_no_kernels_have_the_full_weights(monkeypatch):
    from nemo_ee.decoding.cpu.cpu_kernels import SWITCH

    monkeypatch.setenv(SWITCH, "0")
    gpt = tiny_model(tiny_model_config(head=HEADS["MLP, untied"])).gpt
    with torch.inference_mode():
        for _, full, eight in heads_of(gpt):
            assert type(eight.projection) is type(full.projection)
