# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""CPU kernels against torch's operations, layer by layer, in float64."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_ee.decoding.cpu.cpu_kernels import KERNEL_TOKENS, SWITCH, kernel_linear, run_head
from nemo_ee.decoding.cpu.kernels.compiled import compiled
from nemo_ee.decoding.cpu.kernels.exponential import exponential
from nemo_ee.decoding.cpu.kernels.readout import Head
from nemo_ee.decoding.decoding_model import DecodingModel
from nemo_ee.decoding.layers.packed_tokens import PackedTokens
from nemo_ee.decoding.layers.segment import Segment
from nemo_ee.modeling.row_summary import confidence, summarise_rows
from tests.support.tiny_gpt import GPT3, tiny_model, tiny_model_config

ROOT = Path(__file__).resolve().parents[2]
ROWS, LENGTH = 4, 24
PACKS = {
    "one token": ([2], [7], [1]),
    "a first token": ([0], [0], [1]),
    "several of one text": ([1], [3], [5]),
    "one of each": ([0, 1, 2, 3], [9, 2, 0, 12], [1, 1, 1, 1]),
    "some rows, ragged": ([1, 3], [4, 0], [2, 6]),
    "as many as there may be": ([0, 2], [1, 8], [9, KERNEL_TOKENS - 9]),
}
BACKBONES = {
    "RMSNorm, SwiGLU, RoPE": {},
    "LayerNorm, GELU, biases, learned positions": dict(GPT3, bias_activation_fusion=False),
    "LayerNorm, tanh GELU": dict(
        normalization="layernorm", activation="gelu", bias=True, bias_activation_fusion=True
    ),
    "ReGLU, half rotary, interleaved": dict(
        activation="reglu", rotary_percentage=0.5, rotary_interleaved=True
    ),
    "GeGLU, one group": dict(activation="geglu", num_query_groups=1),
    "no groups, norms of heads": dict(num_query_groups=8, qk_layernorm=True),
    "squared ReLU, which kernels do not know": dict(activation="squared-relu", bias_activation_fusion=False),
    "some layers without RoPE": dict(no_rope_freq=2),
    "odd sizes": dict(hidden_size=40, ffn_hidden_size=37, kv_channels=6),
}


@pytest.fixture(scope="module", params=BACKBONES)
def gpt(request):
    return tiny_model(tiny_model_config(**BACKBONES[request.param]), dtype=torch.float64).gpt


def run_pack(gpt, pack, threads=2):
    """Output, keys and values of three layers after a pack whose sequences have a past."""
    generator = torch.Generator().manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            model = DecodingModel(gpt)
            layers = [model.cached_layers(ROWS, LENGTH)[n] for n in (3, 4, 5)]
            for layer in layers:
                layer.cache.copy_(torch.randn(layer.cache.shape, generator=generator, dtype=torch.float64))
            x = torch.randn(sum(pack[2]), gpt.config.hidden_size, generator=generator, dtype=torch.float64)
            kept = {n: torch.zeros(ROWS, LENGTH, gpt.config.hidden_size, dtype=torch.float64) for n in (0, 2)}
            out = Segment(layers, kept)(x, PackedTokens(model.table(LENGTH), *pack))
        return [out, *(layer.cache for layer in layers), *kept.values()]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("pack", PACKS)
def test_layers_equal_torchs(gpt, pack, monkeypatch):
    found = run_pack(gpt, PACKS[pack])
    monkeypatch.setenv(SWITCH, "0")
    expected = run_pack(gpt, PACKS[pack])
    for mine, other in zip(found, expected, strict=True):
        assert mine.dtype == other.dtype == torch.float64
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)
    assert not found[0].equal(expected[0]), "two ways, not one"


def test_any_number_of_threads_gives_the_same(gpt):
    one, *others = [run_pack(gpt, PACKS["some rows, ragged"], threads) for threads in (1, 2, 3)]
    for other in others:
        for mine, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


HEADS = {
    "projection": {},
    "norm, shortlist": dict(norm=True, projection="shortlist"),
    "norm, linear": dict(norm=True, linear=True),
    "linear, shortlist": dict(linear=True, projection="shortlist"),
    "MLP": dict(mlp=True),
    "MLP, norm, shortlist": dict(mlp=True, norm=True, projection="shortlist"),
    "MLP, norm, linear, shortlist": dict(mlp=True, norm=True, linear=True, projection="shortlist"),
}


def heads_say(gpt, tokens):
    """Logits, tokens and confidence of exits and the final exit."""
    x = torch.randn(tokens, gpt.config.hidden_size, dtype=torch.float64)
    with torch.inference_mode():
        model = DecodingModel(gpt)
        found = [each.predict(x) for each in (*model.heads.values(), model.output)]
    return [(each.logits, each.tokens, each.confidence) for each in found]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", list(BACKBONES)[:3] + ["squared ReLU, which kernels do not know"])
def test_heads_equal_torchs(backbone, head, monkeypatch):
    usual = dict(norm=False, linear=False, mlp=False, projection="untied", shortlist_size=60)
    config = tiny_model_config(head={**usual, **HEADS[head]}, **BACKBONES[backbone])
    gpt = tiny_model(config, dtype=torch.float64).gpt
    with torch.no_grad():
        for parameter in gpt.exits.parameters():  # biases are zero at first, translators the identity
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for tokens in (1, 5):
        found = []
        for kernels in ("1", "0"):
            torch.manual_seed(tokens)
            monkeypatch.setenv(SWITCH, kernels)
            found.append(heads_say(gpt, tokens))
        for mine, other in zip(*found, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)
        assert not all(mine[0].equal(other[0]) for mine, other in zip(*found, strict=True))


def plain_head(weight, bucket):
    linear = kernel_linear(weight, None, None, torch.float64)
    return Head.plain(linear, bucket.numpy(), np.empty(0, np.int64))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("emittable", [50, 33, 7, 1, 0])
@pytest.mark.parametrize("with_bucket", [False, True])
def test_logits_and_their_summary_equal_torchs(emittable, with_bucket, threads):
    for tokens in (1, 2, 6):
        generator = torch.Generator().manual_seed(tokens)
        weight, x = (torch.randn(n, 20, generator=generator, dtype=torch.float64) for n in (50, tokens))
        weight[5] = weight[40]  # equal logits: the lower row counts
        bucket = torch.randn(21, generator=generator, dtype=torch.float64)[: 21 * with_bucket]
        logits = x @ weight.t()
        logits[:, emittable:] = float("-inf")
        if with_bucket:
            logits = torch.cat([logits, x @ bucket[:-1, None] + bucket[-1]], dim=-1)
        expected = summarise_rows(logits, emittable)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        answer = run_head(plain_head(weight, bucket), emittable, x)
        torch.set_num_threads(before)
        torch.testing.assert_close(answer.logits, logits)
        torch.testing.assert_close(answer.summary.best, expected.best)
        torch.testing.assert_close(answer.summary.log_sum, expected.log_sum)
        if emittable:
            torch.testing.assert_close(answer.confidence, confidence(expected.best, expected.log_sum))
        assert answer.summary.row.equal(expected.row) and answer.tokens.equal(expected.row)


def test_a_summary_of_nan_is_nan():
    weight, x = torch.ones(40, 4, dtype=torch.float64), torch.ones(2, 4, dtype=torch.float64)
    x[1, 2] = float("nan")
    summary = run_head(plain_head(weight, torch.empty(0, dtype=torch.float64)), 30, x).summary
    assert summary.best[1].isnan() and summary.log_sum[1].isnan()
    assert summary.best[0] == 4 and summary.log_sum[0].item() == pytest.approx(4 + np.log(30))


def test_nan_stays_in_its_row():
    gpt = tiny_model(tiny_model_config(), dtype=torch.float64).gpt
    with torch.inference_mode():
        model = DecodingModel(gpt)
        layers = list(model.cached_layers(2, 8).values())
        x = torch.randn(2, 64, dtype=torch.float64)
        x[0, 5] = float("nan")
        out = Segment(layers)(x, PackedTokens(model.table(8), [0, 1], [0, 0], [1, 1]))
    assert out[0].isnan().all() and not out[1].isnan().any()


@compiled(parallel=True)
def exponentials(x, y):
    for i in range(len(x)):
        y[i] = exponential(x[i])


def test_the_exponential_is_float32s():
    x = np.linspace(-86, 87, 100_001, dtype=np.float32)
    y = np.empty_like(x)
    exponentials(x, y)
    assert np.abs(y / np.exp(x.astype(np.float64)) - 1).max() < 3e-7
    special = np.array([0, -np.inf, -1000, np.nan, np.inf], np.float32)
    y = np.empty_like(special)
    exponentials(special, y)
    assert y[0] == 1 and 0 <= y[1] == y[2] < 1e-37 and np.isnan(y[3]) and y[4] > 1e38


def test_compiled_kernels_are_read_from_the_cache_and_run(tmp_path):
    code = """
import numpy as np
from nemo_ee.decoding.cpu.kernels.products import product
none, out = np.empty(0), np.empty((1, 20))
product(np.ones((20, 3)), none, none, np.ones((1, 3)), out, 2)
assert (out == 3).all()
print(sum(product.stats.cache_hits.values()))
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    run = [sys.executable, "-c", code]
    hits = [
        subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert [int(each) for each in hits] == [0, 1]


def test_a_package_that_cannot_be_written_to_still_computes(tmp_path):
    code = """
from numba.core import caching
caching.CacheImpl._locator_classes = []
import numpy as np
from nemo_ee.decoding.cpu.kernels.products import product
none, out = np.empty(0), np.empty((1, 20))
product(np.ones((20, 3)), none, none, np.ones((1, 3)), out, 2)
assert (out == 3).all()
"""
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_kernels_leave_the_number_of_threads_alone():
    code = """
import torch
from nemo_ee.decoding.cpu.cpu_kernels import kernel_linear, run_product
one = torch.ones(1, 3)
run_product(kernel_linear(torch.ones(20, 3), None, None, torch.float32), one)
print(torch.get_num_threads())
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert printed.split() == ["1"]


def test_a_cached_kernel_is_compiled_again_when_one_that_it_calls_changes(tmp_path):
    kernels = tmp_path / "nemo_ee/decoding/cpu/kernels"
    kernels.mkdir(parents=True)
    for package in (kernels, *kernels.parents[:3]):
        (package / "__init__.py").touch()
    shutil.copy(ROOT / "nemo_ee/decoding/cpu/kernels/compiled.py", kernels)
    head = "from nemo_ee.decoding.cpu.kernels.compiled import compiled\n"
    outer = "from nemo_ee.decoding.cpu.kernels.inner import f\n\n@compiled(parallel=True)\ndef g(x):\n    return f(x)\n"
    (kernels / "outer.py").write_text(head + outer)
    code = "from nemo_ee.decoding.cpu.kernels.outer import g; print(g(3), sum(g.stats.cache_hits.values()))"
    printed = []
    for change in ("x + 1", "x + 1", "x + 20"):
        (kernels / "inner.py").write_text(f"{head}\n@compiled\ndef f(x):\n    return {change}\n")
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        printed.append(done.stdout.split())
    assert printed == [["4", "0"], ["4", "1"], ["23", "0"]]
