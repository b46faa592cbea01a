# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Decoding under autocast as a GPU does it: operations that it promotes to float32 mix with bfloat16 caches."""

import pytest
import torch

from tests.support.cuda_autocast import CudaPromotions, promoted
from tests.support.drafting import drafting_eagerly
from tests.support.tiny_gpt import GPT3, HEADS, tiny_model, tiny_model_config
from tests.support.transformer_engine import tiny_te_model, transformer_engine

PROMPTS = [[7, 8, 9, 20, 33], [41], [100, 7, 55, 56, 57, 58, 59, 60]]
FORCED = torch.randint(0, 190, (12, len(PROMPTS)), generator=torch.Generator().manual_seed(0))
BACKBONES = {
    "norms of heads": dict(qk_layernorm=True),
    "GPT-3, norms of heads": dict(GPT3, qk_layernorm=True),
    "float32 residuals": dict(qk_layernorm=True, fp32_residual_connection=True),
}


def config_of(backbone, **overrides):
    return tiny_model_config(
        head=HEADS["block, MLP, linear, untied"],
        **{"share_embeddings_and_output_weights": False, **BACKBONES[backbone], **overrides},
    )


def confidences(model, exits):
    """[steps][sequences] of forced tokens."""
    from nemo_ee.decoding.decoder import EarlyExitDecoder
    from nemo_ee.decoding.decoding_model import DecodingModel
    from nemo_ee.generation.generating import generating

    with generating(model):
        decoder = EarlyExitDecoder(DecodingModel(model.gpt), list(exits), len(PROMPTS), 40)
        out = [decoder.prefill(PROMPTS).confidences]
        for tokens in FORCED:
            out.append(decoder.step(tokens, [list(exits.values())] * len(PROMPTS)).confidences)
    return torch.tensor(out)


def test_what_autocast_promotes_is_read_from_torch():
    """Torch 2.7 does not promote `rms_norm`, later ones do."""
    assert {"layer_norm", "softmax", "cumsum", "linalg_vector_norm"} <= promoted()
    assert not {"linear", "addmm", "matmul", "scaled_dot_product_attention", "cat"} & promoted()
    half = torch.ones(2, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), CudaPromotions():
        assert torch.nn.functional.layer_norm(half, (4,)).dtype == torch.float32
        assert torch.nn.functional.linear(half.float(), half.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("of_te", [False, True], ids=["torch's modules", "Transformer Engine's"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_several_sequences_decode_with_norms_in_float32(backbone, of_te):
    exact = tiny_model(config_of(backbone, fp32_residual_connection=False), dtype=torch.float64)
    with transformer_engine():
        model = (tiny_te_model if of_te else tiny_model)(config_of(backbone, precision="bf16"))
        with CudaPromotions():
            found = [confidences(model, dict.fromkeys((2, 4, 6), at)) for at in (0.0, 0.999)]
    for at, rough in zip((0.0, 0.999), found, strict=True):
        expected = confidences(exact, dict.fromkeys((2, 4, 6), at))
        # 8 layers in bfloat16 and logits of standard deviation 4: most err by hundredths of a probability.
        assert (rough - expected).abs().max() < 0.25 and (rough - expected).abs().mean() < 0.03


@pytest.mark.parametrize("options", ["greedy", "sampled", "lossless", "similarity", "entropy", "margin"])
def test_every_way_to_decode_runs(options):
    model = tiny_model(config_of("norms of heads", precision="bf16"))
    early = dict(threshold=0.5, **({"lossless": True} if options == "lossless" else {"always": True}))
    if options in ("similarity", "entropy", "margin"):
        early["confidence"] = options
    sampling = dict(add_BOS=False, use_greedy=True, all_probs=True)
    if options in ("sampled", "lossless"):
        sampling |= dict(use_greedy=False, top_p=0.9, top_k=20, repetition_penalty=1.2)
    ids = torch.zeros(len(PROMPTS), 8, dtype=torch.long)
    for row, prompt in zip(ids, PROMPTS, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    lengths = torch.tensor([len(prompt) for prompt in PROMPTS])
    with CudaPromotions(), drafting_eagerly():
        out = model.generate((ids, lengths), dict(max_length=16, min_length=8), sampling, early_exit=early)
    assert all(len(row) >= 8 for row in out["token_ids"])
