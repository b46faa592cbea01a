# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What flash attention's calls are given, held to what their packages document, by slow stand-ins in float64.

The stand-ins do what the docstrings of `flash_attn_with_kvcache` (flash-attn 2.8) and `varlen_attn` (torch 2.13) say,
sequence by sequence, and refuse what the packages refuse. What no key may be read of is NaN.
"""

import inspect
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nemo_ee.decoding.cpu.cpu_kernels import SWITCH
from nemo_ee.decoding.cuda import flash_attention
from nemo_ee.decoding.cuda.flash_attention import (
    MASKED,
    KeyValueCacheAttention,
    VariableLengthAttention,
    chosen_attention,
    first_that_agrees,
)
from nemo_ee.decoding.cuda.static_tokens import StaticTokens
from nemo_ee.decoding.layers.cached_attention import MaskedAttention
from nemo_ee.decoding.layers.packed_tokens import PositionTable
from tests.support.captured import PROMPTS, decode, expect_same, expect_same_caches, model_of
from tests.support.tape import TapeCapture
from tests.support.tiny_gpt import HEADS, tiny_model, tiny_model_config

CPU = torch.device("cpu")


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float | None, causal: bool) -> Tensor:
    """Of one sequence: query [q, Hq, D], keys and values [k, Hkv, D] -> [q, Hq, D]; causal to the lower right."""
    repeats = query.shape[1] // keys.shape[1]
    keys, values = (each.repeat_interleave(repeats, dim=1) for each in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query, keys) * (scale or query.shape[-1] ** -0.5)
    if causal:
        late = len(keys) - len(query)
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(late + 1), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)


@torch.library.custom_op("nemo_ee_tests::with_kvcache", mutates_args=())
def with_kvcache_op(
    q: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, cache_batch_idx: Tensor, scale: float | None
) -> Tensor:
    """`flash_attn_with_kvcache(q [B, 1, Hq, D], k and v [rows, P, Hkv, D], …)`; opaque to a tape, as a kernel is."""
    assert cache_seqlens.dtype == cache_batch_idx.dtype == torch.int32
    assert len(cache_seqlens) == len(cache_batch_idx) == len(q) and k.stride(-1) == v.stride(-1) == 1
    assert q.shape[2] % k.shape[2] == 0 and k.shape == v.shape
    places = zip(cache_batch_idx.tolist(), cache_seqlens.tolist(), strict=True)
    assert all(0 < length <= k.shape[1] for length in cache_seqlens.tolist())
    outs = [
        attend(one, k[row, :length], v[row, :length], scale, causal=False)
        for one, (row, length) in zip(q, places, strict=True)
    ]
    return torch.stack(outs)


@torch.library.custom_op("nemo_ee_tests::varlen", mutates_args=())
def varlen_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
    seqused_k: Tensor,
) -> Tensor:
    """`varlen_attn(query [Tq, Hq, D], key and value [Tk, Hkv, D], …)`, causal."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == seqused_k.dtype == torch.int32
    assert len(cu_seq_q) == len(cu_seq_k) == len(seqused_k) + 1
    assert key.stride(-1) == value.stride(-1) == 1 and cu_seq_q.is_contiguous() and cu_seq_k.is_contiguous()
    new, cached, used = cu_seq_q.tolist(), cu_seq_k.tolist(), seqused_k.tolist()
    assert new == sorted(new) and new[0] == 0 and new[-1] <= len(query)
    assert cached == sorted(cached) and cached[0] == 0 and cached[-1] == len(key)
    out = torch.full_like(query, float("nan"))  # of queries of no sequence nothing is said
    for n, keys in enumerate(used):
        assert new[n + 1] - new[n] <= max_q and keys <= cached[n + 1] - cached[n] <= max_k
        q, k = slice(new[n], new[n + 1]), slice(cached[n], cached[n] + keys)
        out[q] = attend(query[q], key[k], value[k], scale, causal=True)
    return out


def with_kvcache(q, k_cache, v_cache, *, cache_seqlens, cache_batch_idx, softmax_scale=None):
    return with_kvcache_op(q, k_cache, v_cache, cache_seqlens, cache_batch_idx, softmax_scale)


def varlen(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa, seqused_k):
    assert window_size == (-1, 0) and enable_gqa == (query.shape[1] != key.shape[1])
    return varlen_op(query, key, value, cu_q, cu_k, max_q, max_k, scale, seqused_k)


CALLS = {"with_kvcache": KeyValueCacheAttention(with_kvcache), "varlen": VariableLengthAttention(varlen)}


@pytest.fixture(autouse=True)
def torchs_operations(monkeypatch):
    """Our CPU kernels read caches of another layout."""
    monkeypatch.setenv(SWITCH, "0")


@pytest.fixture(scope="module", params=[2, 4], ids=["grouped queries", "a key per query"])
def gpt(request):
    changes = dict(num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4)
    head = HEADS["block, MLP, linear, untied"]
    config = tiny_model_config(exits=[1, 2, 3], head=head, num_query_groups=request.param, **changes)
    return tiny_model(config, dtype=torch.float64).gpt


@pytest.mark.parametrize("policy", ["catch_up", "recompute", "state_copy"])
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("call", CALLS)
def test_decoding_equals_the_masked_reference(gpt, call, captured, policy):
    exits = {1: 0.95, 2: 0.95, 3: 0.95}
    expected, plain = decode(model_of(gpt), PROMPTS[:3], 16, exits, kv_policy=policy)
    tape = TapeCapture() if captured else None
    model = model_of(gpt, tape, attention=CALLS[call])
    found, decoder = decode(model, PROMPTS[:3], 16, exits, kv_policy=policy)
    expect_same(found, expected)
    expect_same_caches(decoder, plain)
    if tape is not None:
        assert decoder.passes.eager == 0
        shapes = {key[3:] for key in decoder.passes._captured if isinstance(key[0], str)}
        assert len(shapes) == 1, "the number of keys looked at asks for no captures of its own"


@pytest.mark.parametrize("call", CALLS)
def test_no_key_behind_a_sequence_and_none_of_other_rows_is_read(gpt, call):
    """All that is not in use is NaN, before every step."""
    exits = {1: 0.95, 2: 0.95, 3: 0.95}
    with torch.inference_mode():
        from tests.support.captured import make_decoder

        plain = make_decoder(model_of(gpt), 5, 40, exits)
        decoder = make_decoder(model_of(gpt, TapeCapture(), 5, 40, CALLS[call]), 5, 40, exits)
        steps = [each.prefill(PROMPTS[:5]) for each in (plain, decoder)]
        for n in range(8):
            for k, segment in enumerate(decoder.segments):
                for layer in segment:
                    for row, length in enumerate(decoder.filled[k]):
                        layer.cache[:, row, :, length:] = float("nan")
            rows = [[0, 1, 2, 3, 4], [1, 3], [4]][n % 3]
            tokens = steps[0].greedy_tokens()[: len(rows)] if n == 0 else torch.tensor([7 + n] * len(rows))
            thresholds = [list(exits.values())] * len(rows)
            steps = [each.step(tokens, thresholds, rows) for each in (plain, decoder)]
            assert steps[0].exit_layers == steps[1].exit_layers
            for mine, other in zip(steps[1].parts, steps[0].parts, strict=True):
                logits = mine.prediction.logits, other.prediction.logits
                torch.testing.assert_close(*logits, rtol=1e-10, atol=1e-10)


def test_padding_asks_for_one_key():
    table = PositionTable(33, CPU)
    packed = StaticTokens(table, torch.tensor([[0, 1, 1, 1], [4, 30, 32, 32]]), 32, "any")
    assert packed.keys_seen.tolist() == [5, 31, 1, 1]


def test_torchs_call_takes_what_it_is_given():
    """By its own signature and its own account of shapes; the kernel needs a GPU."""
    varlen_attn = pytest.importorskip(
        "torch.nn.attention.varlen", reason="it came after torch 2.7"
    ).varlen_attn
    given = []

    def noted(*args, **kwargs):
        inspect.signature(varlen_attn).bind(*args, **kwargs)
        given.append((args, kwargs))
        return varlen(*args, **kwargs)

    _, refused = first_that_agrees([VariableLengthAttention(noted)], CPU, torch.float32, 2, 3, 16)
    assert refused == ()
    with FakeTensorMode(allow_non_fake_inputs=True):
        shapes = [varlen_attn(*args, **kwargs).shape for args, kwargs in given]
    assert shapes == [args[0].shape for args, _ in given] == [(6, 6, 16), (1, 6, 16)]


@pytest.mark.parametrize("call", CALLS)
def test_a_call_is_used_once_it_agrees_with_the_reference(call):
    good = CALLS[call]

    def wrong(*args, **kwargs):
        return good._call(*args, **kwargs) * 1.1

    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image is available")

    kind = type(good)
    found, refused = first_that_agrees([kind(wrong), kind(broken), good], CPU, torch.float32, 2, 3, 16)
    assert found is good
    assert "differs by" in refused[0] and refused[1].endswith("failed on cpu: no kernel image is available")
    found, refused = first_that_agrees([kind(wrong)], CPU, torch.float32, 2, 3, 16)
    assert isinstance(found, MaskedAttention) and len(refused) == 1


def test_a_call_that_reads_too_far_is_refused():
    """The example must show it: keys behind a sequence's end, or of another row."""

    def one_too_many(q, k, v, *, cache_seqlens, cache_batch_idx, softmax_scale=None):
        return with_kvcache_op(q, k, v, cache_seqlens + 1, cache_batch_idx, softmax_scale)

    def next_row(q, k, v, *, cache_seqlens, cache_batch_idx, softmax_scale=None):
        rows = (cache_batch_idx + 1) % len(k)
        return with_kvcache_op(q, k, v, cache_seqlens, rows.int(), softmax_scale)

    def only_the_spare_position(q, k, v, *, cache_seqlens, cache_batch_idx, softmax_scale=None):
        """What masked keys weigh, 0, times what padding has left behind the others."""
        return (
            with_kvcache(q, k, v, cache_seqlens=cache_seqlens, cache_batch_idx=cache_batch_idx)
            + 0 * v[:1, -1:, :1]
        )

    for call in (one_too_many, next_row, only_the_spare_position):
        found, _ = first_that_agrees([KeyValueCacheAttention(call)], CPU, torch.bfloat16, 2, 3, 16)
        assert found is MASKED


def test_a_call_that_cannot_take_one_token_alone_is_refused():
    """Kernels choose other ways for one query."""

    def several(q, *args, **kwargs):
        if len(q) == 1:
            raise RuntimeError("shape '[4, 2, 3, 16]' is invalid")
        return with_kvcache(q, *args, **kwargs)

    found, (refused,) = first_that_agrees([KeyValueCacheAttention(several)], CPU, torch.float32, 2, 3, 16)
    assert found is MASKED and refused.endswith("is invalid")


def test_autocast_does_not_round_the_reference(monkeypatch):
    """Models are made ready under it; the difference is the call's own."""
    monkeypatch.setattr(flash_attention, "TOLERANCE", 1e-6)
    exact = KeyValueCacheAttention(with_kvcache)
    with torch.autocast("cpu", torch.bfloat16):
        assert first_that_agrees([exact], CPU, torch.float32, 2, 3, 16) == (exact, ())


def test_other_devices_dtypes_and_heads_have_the_masked_reference(monkeypatch):
    assert chosen_attention(CPU, torch.bfloat16, 2, 2, 64) == (MASKED, ())
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for dtype, size in [
        (torch.float32, 64),
        (torch.bfloat16, 60),
        (torch.bfloat16, 264),
        (torch.float16, 64),
    ]:
        assert chosen_attention(cuda, dtype, 2, 2, size) == (MASKED, ())


def attended(attention, query, cache, table, index):
    tokens = StaticTokens(table, index, len(table.positions) - 1, "any")
    return (attention(query, cache, tokens, None),)


@pytest.mark.gpu
@pytest.mark.gpu_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_installed_calls_on_a_gpu(dtype):
    """Each agrees with the masked reference, replayed in a graph as well, after rows and positions have changed."""
    from nemo_ee.decoding.cuda.cuda_capture import CudaCapture
    from nemo_ee.decoding.cuda.flash_attention import candidates

    device, found = torch.device("cuda"), list(candidates())
    assert found, "torch 2.13 has one"
    table, draw = PositionTable(513, device), torch.Generator().manual_seed(1)
    for attention in found:
        for heads in [(2, 3, 64), (8, 4, 128), (4, 1, 64)]:
            assert first_that_agrees([attention], device, dtype, *heads) == (attention, ())
        query = torch.randn(4, 2, 3, 64, generator=draw).to(device, dtype)
        cache = attention.empty_cache(3, 2, 513, 64, dtype, device)
        cache.copy_(torch.randn(cache.shape, generator=draw))
        index = torch.tensor([[0, 1, 2, 0], [1, 1, 1, 512]], device=device)
        captured = CudaCapture(device)(partial(attended, attention, query, cache, table, index))
        index.copy_(torch.tensor([[0, 2, 2, 1], [7, 300, 301, 512]]))
        captured.replay()
        (expected,) = attended(MASKED, query.float(), cache.float(), table, index)
        torch.testing.assert_close(captured.outputs[0][:3].float(), expected[:3], rtol=0.02, atol=0.02)
