# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Decoding on a real GPU: graphs against eager passes, and our layers against Megatron's own, in every precision.

Greedy tokens against the CPU's are in scripts/gpu_check/tokens.py.
"""

import pytest
import torch

from tests.support.drafting import drafting_eagerly
from tests.support.tiny_gpt import HEADS, tiny_model, tiny_model_config

pytestmark = pytest.mark.gpu

PROMPTS = [[7, 8, 9, 20, 33], [41], [100, 7, 55, 56, 57, 58, 59, 60, 12, 13, 90, 3], [5, 6]]
TOKENS = 24
EXITS = {"exits": [2, 4, 6], "threshold": [0.7, 0.5, 0.6]}
WAYS = {"full depth": False, "exits": {**EXITS, "always": True}, "lossless": {**EXITS, "lossless": True}}
GREEDY = {"use_greedy": True, "add_BOS": False, "end_strings": ["<|endoftext|>"]}


def padded(prompts):
    longest = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    return ids, torch.tensor([len(prompt) for prompt in prompts])


def generated(model, early_exit):
    """Tokens, exit layers and confidences of all prompts, batched and one by one."""
    rows = []
    with drafting_eagerly():
        for prompts in (PROMPTS, PROMPTS[:1]):
            lengths = {"max_length": TOKENS, "min_length": TOKENS}
            output = model.generate(padded(prompts), lengths, GREEDY, early_exit=early_exit)
            exits = output["early_exit"]
            rows += [(output["token_ids"][i], each) for i, each in enumerate(exits)]
    return rows


@pytest.mark.parametrize("kind", HEADS)
def test_graphs_decode_as_eager_passes_do(kind):
    """In float32. Passes padded to other sizes may run other kernels, which differ by 1e-6 or so."""
    model = tiny_model(tiny_model_config(head=HEADS[kind], share_embeddings_and_output_weights=False))
    found = {}
    for graphs in (True, False):
        model.prepare_decoding(cuda_graphs=graphs, rows=len(PROMPTS), max_length=TOKENS + 16)
        found[graphs] = {name: generated(model, early_exit) for name, early_exit in WAYS.items()}
        captured = model._decoding_model.captured
        assert (captured is not None) == graphs
        if graphs:
            assert captured.passes.replayed > 100 and captured.passes.eager == 0
    for name in WAYS:
        for (mine, exits), (other, reference) in zip(found[True][name], found[False][name], strict=True):
            assert mine == other and exits["exit_layers"] == reference["exit_layers"]
            assert exits["confidences"] == pytest.approx(reference["confidences"], rel=1e-3)
    texts = [[mine for mine, _ in found[True][name]] for name in ("full depth", "lossless")]
    assert texts[0] == texts[1]
    assert len({n for _, row in found[True]["exits"] for n in row["exit_layers"]}) > 1


# Of the mean over a text's tokens, in nats. Ours and Megatron's modules round in other places: 2 to the power of -24,
# -9 and -12 relative, times what eight layers of random weights make of it: 2e-6, 0.06 and 0.008 on a CPU.
PRECISIONS = {
    "float32": (dict(precision=32), 3e-5),
    "bfloat16": (dict(precision="bf16", megatron_amp_O2=True), 0.15),
    "bfloat16 by autocast": (dict(precision="bf16"), 0.15),
    "float16": (dict(precision=16, megatron_amp_O2=True), 0.02),
    "float16 by autocast": (dict(precision=16), 0.02),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_prompts_have_the_probabilities_of_megatrons_own_forward(precision):
    from nemo_ee.generation.generating import generating

    changes, tolerance = PRECISIONS[precision]
    model = tiny_model(tiny_model_config(head=HEADS["block, MLP, linear, untied"], **changes))
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(3, 201, (8, 40), generator=generator)
    sampling = {**GREEDY, "compute_logprob": True, "all_probs": True}
    found = model.generate((prompts, torch.tensor([40] * 8)), {"max_length": 1}, sampling)["logprob"]
    with generating(model):
        ids = prompts.cuda()
        states = model.gpt.forward_states(ids, torch.arange(40, device="cuda")[None].expand(8, -1), None)
        logits = (states.output.float() @ model.gpt.output_weight().float().T)[
            ..., : model.gpt.true_vocab_size
        ]
        expected = logits.log_softmax(-1).transpose(0, 1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    difference = (torch.stack([row.float().cpu() for row in found])[:, :39] - expected.cpu()).abs().mean()
    assert difference < tolerance
