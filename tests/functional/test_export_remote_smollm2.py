# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""SmolLM2-135M exported with its exits: transformers drafts with them as often as our own exits would be right.

The exits are fitted to the texts in closed form, loosely. With a base and exits of your own:

    NEMO_EE_EXPORTED="smollm2.nemo exits.nemo" pytest --slow -s tests/functional/test_export_remote_smollm2.py
"""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.functional.test_convert_llama import SMOLLM2_PROMPTS
from tests.functional.test_generation_smollm2 import HEADS, restore, source  # noqa: F401
from tests.support.remote_folder import confidences, logits_of, rounds

STEPS = 24
DRAFTS = 20
"""transformers' own number in a round."""
TRANSLATOR = dict(mlp=False, linear=True, norm=True, projection="tied")
PENALTY = 1.0
"""Of the fit; large enough that not all drafts are right."""
GIVEN = os.environ.get("NEMO_EE_EXPORTED", "").split()


@torch.no_grad()
def fit(gpt, texts):
    """Sets exits' weights so that they are right about some of the tokens of texts."""
    from nemo_ee.modeling.first_weights.exit_init import RidgeInitialiser, initialise_projections

    initialise_projections(gpt, torch.arange(8192), None)
    closed_form = RidgeInitialiser(gpt)
    for ids in map(torch.tensor, texts):
        states = gpt.forward_states(ids[None], torch.arange(len(ids))[None], None)
        tokens = SimpleNamespace(loss_mask=torch.ones(1, len(ids)), attention_mask=None)
        closed_form(tokens, states, states.output)
    closed_form.finish(PENALTY)


def write(folder, gguf):
    """Exports `remote`; run it in a rank of its own.

    Returns:
        Per prompt: its ids, the greedy text, and exit layer -> what the exit says in the place of each of its tokens.
    """
    from nemo_ee.export.export import export
    from nemo_ee.export.settings import ExportConfig
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel as Model
    from tests.support.tiny_gpt import tiny_trainer

    if GIVEN:
        base, exits = GIVEN
        model = Model.restore_with_exits(base, exits, tiny_trainer()).eval()
    else:
        model = restore(gguf, [HEADS["block, shortlist"], TRANSLATOR])
        base, exits = str(Path(gguf).with_name("smollm2.nemo")), f"{folder}/exits.nemo"
    lengths = dict(max_length=STEPS, min_length=0)
    how = dict(early_exit=False)
    texts = [
        model.generate([p], lengths, dict(add_BOS=False), **how)["token_ids"][0] for p in SMOLLM2_PROMPTS
    ]
    if not GIVEN:
        fit(model.gpt, texts)
        model.save_adapters(exits)
    export(ExportConfig("remote", base, f"{folder}/remote", adapter_file=exits))
    found = []
    for prompt, out in zip(SMOLLM2_PROMPTS, texts, strict=True):
        ids = model.tokenizer.text_to_ids(prompt)
        said = {}
        for n, (logits, tokens) in logits_of(model.gpt, torch.tensor(out)).items():
            best = tokens[logits.masked_fill(tokens < 0, float("-inf")).argmax(-1)]
            pairs = zip(best.tolist(), confidences(logits, tokens).tolist(), strict=True)
            said[n] = [*pairs][len(ids) - 1 :]
        found.append((ids, out[len(ids) :], said))
    return found


@pytest.mark.slow
def test_drafts_are_accepted_as_often_as_our_exits_are_right(workers, tmp_path, request):
    from transformers import AutoModelForCausalLM

    gguf = None if GIVEN else str(request.getfixturevalue("source"))
    (found,) = workers(1).run(write, str(tmp_path), gguf, timeout=1200)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "remote", trust_remote_code=True).eval()
    passes = []
    model.model.layers[-1].register_forward_hook(lambda *_: passes.append(1))
    for n in (10, 20):
        tokens = theirs = ours = 0
        for ids, text, said in found:
            passes.clear()
            inputs = torch.tensor([ids])
            out = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                assistant_early_exit=n,
                do_sample=False,
                max_new_tokens=STEPS,
            )
            assert out[0, len(ids) :].tolist() == text
            tokens, theirs = tokens + len(text), theirs + len(passes)
            ours += rounds(text, said[n], DRAFTS)
        accepted = [(tokens - count) / count for count in (theirs, ours)]
        print(
            f"exit {n}: {tokens} tokens, accepted drafts per round {accepted[0]:.3f}, by our exits {accepted[1]:.3f}"
        )
        assert accepted[0] == pytest.approx(accepted[1], rel=0.05) and accepted[0] > 0
