# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The greedy token found with 8-bit rows is the output layer's own, or the layer is asked."""

import numpy as np
import pytest
import torch

ROWS, HIDDEN = 512, 48
STATES = {
    "usual": lambda: torch.randn(8, HIDDEN),
    "near a row": lambda: 3 * weights()[torch.randint(ROWS, (8,))] + 0.1 * torch.randn(8, HIDDEN),
    "huge": lambda: 1e30 * torch.randn(8, HIDDEN),
    "overflowing": lambda: 1e38 * torch.randn(8, HIDDEN),
    "tiny": lambda: 1e-30 * torch.randn(8, HIDDEN),
    "below normal numbers": lambda: 1e-41 * torch.randn(8, HIDDEN),
    "of very different features": lambda: torch.randn(8, HIDDEN) * 10.0 ** torch.randint(-12, 12, (HIDDEN,)),
    "zeros": lambda: torch.zeros(8, HIDDEN),
    "one feature": lambda: torch.eye(HIDDEN)[:8],
}
ROWS_OF = {
    "usual": lambda w: w,
    "twice the same": lambda w: torch.cat([w[: ROWS // 2]] * 2),
    "one unit in the last place apart": lambda w: torch.cat(
        [w[: ROWS // 2], torch.nextafter(w[: ROWS // 2], torch.tensor(torch.inf, dtype=w.dtype))]
    ),
    "a thousandth apart": lambda w: w[:1] + 1e-3 * w,
    "a millionth apart": lambda w: w[:1] + 1e-6 * w,
    "of very different lengths": lambda w: w * 10.0 ** torch.arange(ROWS).remainder(24).sub(12)[:, None],
    "zeros": lambda w: torch.zeros_like(w),
    "one that is not zero": lambda w: torch.zeros_like(w).index_fill_(0, torch.tensor([77]), 1.0),
}


def weights() -> torch.Tensor:
    return torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(5))


def layers(weight: torch.Tensor, dtype: torch.dtype, kind: str, normed: bool) -> tuple:
    """The layer's own kernel, and the search."""
    from nemo_ee.decoding.cpu.cpu_kernels import kernel_norm
    from nemo_ee.decoding.cpu.kernels.readout import Head
    from nemo_ee.decoding.cpu.lean_weights import LeanNorm, lean_linear
    from nemo_ee.decoding.cpu.output_search import OutputSearch

    linear = lean_linear(weight.to(dtype), None, dtype, kind)
    norm = LeanNorm(torch.linspace(0.5, 2, HIDDEN, dtype=dtype), None, 1e-5, True, False) if normed else None
    none = torch.empty(0, dtype=dtype).numpy(), np.empty(0, np.int64)
    own = Head.plain(linear.kernels[0][1], *none)._replace(norm=kernel_norm(norm, dtype))
    return own, OutputSearch(linear, norm, dtype)


@pytest.mark.parametrize("normed", [False, True], ids=["as they are", "normed"])
@pytest.mark.parametrize(
    "kind, dtype", [("native", torch.float32), ("bf16", torch.float32), ("native", torch.float64)]
)
@pytest.mark.parametrize("rows", ROWS_OF)
def test_what_is_found_is_the_layers_own(rows, kind, dtype, normed):
    from nemo_ee.decoding.cpu.cpu_kernels import run_head

    torch.manual_seed(0)
    own, search = layers(ROWS_OF[rows](weights()), dtype, kind, normed)
    found = 0
    for states in STATES.values():
        for count in (1, 2, 3, 8):
            x = states().to(dtype)[:count]
            for emittable in (ROWS, ROWS - 5, 3):
                answer = search(emittable, x)
                if answer is not None:
                    expected = run_head(own, emittable, x)
                    assert answer[0].tolist() == expected.tokens.tolist()
                    gap = (answer[1] - expected.confidence).abs().max()
                    assert rows != "usual" or states is not STATES["usual"] or gap < 0.1
                    found += 1
    assert found > 10 or rows not in ("usual", "one that is not zero"), "it proves something"


def test_usual_states_are_settled_without_the_layer():
    _, search = layers(weights(), torch.float32, "native", True)
    settled = [
        search(ROWS, torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(n))) for n in range(200)
    ]
    assert sum(answer is not None for answer in settled) > 195


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_number_is_for_the_layer_to_say(value):
    own, search = layers(weights(), torch.float32, "native", False)
    x = torch.randn(2, HIDDEN)
    x[1, 3] = value
    assert search(ROWS, x) is None and search(ROWS, x[:1]) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slack_bounds_what_eight_bits_and_rounding_change(dtype):
    """Against products in longer numbers, for states that point where a row's error does: no bound is larger."""
    from nemo_ee.decoding.cpu.cpu_kernels import run_quantise
    from nemo_ee.decoding.cpu.output_search import slack_of

    weight = weights().to(dtype)
    rough = run_quantise(weight)
    slack, rounding = slack_of(rough.lengths, HIDDEN, dtype)
    eight = rough.quantised.double() * rough.scales.double()[:, None]
    worst = weight.double() - eight
    x = worst.to(dtype)
    lengths = x.double().norm(dim=1)
    off = ((weight.double() - eight) * x.double()).sum(1).abs()
    assert (off <= lengths * slack).all() and (off > 0.9 * lengths * slack).float().mean() > 0.9
    own = (weight * x).sum(1).double()
    assert ((own - (weight.double() * x.double()).sum(1)).abs() <= lengths * rounding).all()
