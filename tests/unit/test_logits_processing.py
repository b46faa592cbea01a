# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What may not come, and penalties, are in the logits before any exit is asked: as transformers' processors do it."""

import pytest
import torch

from tests.support.tiny_gpt import HEADS, TEXTS, tiny_model, tiny_model_config

LAYERS = [2, 4, 6]
LIMIT = 16
PENALTIES = (1.3, 100.0, 0.7)


@pytest.fixture(scope="module", params=["block, MLP, linear, untied", "linear, shortlist"])
def model(request):
    config = tiny_model_config(head=HEADS[request.param], share_embeddings_and_output_weights=False)
    return tiny_model(config, dtype=torch.float64)


class Processed:
    """Decoding without caches or kernels: every token is a forward of the whole text, and transformers' processors see
    the logits of each exit in turn."""

    def __init__(self, model, penalty=1.0, least=0, thresholds=()):
        from transformers import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

        self.gpt, self.thresholds = model.gpt, dict(thresholds)
        self.ends = list(model.text_tokenizer.eos_ids)
        self.of_length = lambda n: MinNewTokensLengthLogitsProcessor(n, least, self.ends)
        self.penalise = RepetitionPenaltyLogitsProcessor(penalty)

    def logits(self, text, prompt):
        """Exit layer -> what it says behind a text, processed; and the mass of its bucket, if it has one."""
        with torch.no_grad():
            states = self.gpt.forward_states(torch.tensor([text]), torch.arange(len(text))[None], None)
            found = {}
            for n in LAYERS:
                head = self.gpt.exits[str(n)]
                state = head(states.exits[n], None, states.rotary_pos_emb)[-1]
                local = head.projection.local_logits(state, self.gpt.output_weight())[0]
                kept = head.projection.num_kept
                bucket = local[kept:]  # nothing, padding, or what stands for all other tokens
                logits = local.new_full((201,), float("-inf"))
                logits[head.projection.tokens_of(torch.arange(kept))] = local[:kept]
                found[n] = self.process(logits, text, prompt), bucket
            final = (states.output[-1, 0] @ self.gpt.output_weight().T)[:201]
            found[self.gpt.config.num_layers] = self.process(final, text, prompt), final.new_empty(0)
        return found

    def process(self, logits, text, prompt):
        text = torch.tensor([text])
        return self.of_length(prompt)(text, self.penalise(text, logits[None].clone()))[0]

    def __call__(self, prompt, count):
        text, layers, confidences = list(prompt), [], []
        for i in range(count):
            said = self.logits(text, len(prompt))
            for n, (logits, bucket) in said.items():
                confidence = torch.cat([logits, bucket]).softmax(-1)[: len(logits)].max().item()
                if n == max(said) or (i > 0 and confidence > self.thresholds.get(n, 1.0)):
                    break
            text.append(int(logits.argmax()))
            layers.append(n)
            confidences.append(confidence)
            if text[-1] in self.ends:
                break
        return text[len(prompt) :], layers, confidences


def generated(model, prompts, early_exit, least=0, **sampling):
    sampling = dict(use_greedy=True, add_BOS=False, end_strings=["<|endoftext|>"], **sampling)
    output = model.generate(
        prompts, dict(max_length=LIMIT, min_length=least), sampling, early_exit=early_exit
    )
    rows = zip(output["token_ids"], output["early_exit"], strict=True)
    return [
        (ids[len(ids) - len(row["exit_layers"]) :], row["exit_layers"], row["confidences"])
        for ids, row in rows
    ]


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_repetition_penalty_is_transformers_for_greedy_texts_and_exits(model, penalty):
    thresholds = dict(zip(LAYERS, (0.6, 0.5, 0.7), strict=True))
    prompts = [model.tokenizer.text_to_ids(text) for text in TEXTS]
    early = dict(threshold=list(thresholds.values()), always=True)
    seen = set()
    for exits, given in ((thresholds, early), ({}, False)):
        plain = Processed(model, penalty, thresholds=exits)
        for prompt, (tokens, layers, confidences) in zip(
            prompts, generated(model, prompts, given, repetition_penalty=penalty), strict=True
        ):
            expected = plain(prompt, LIMIT)
            assert (tokens, layers) == expected[:2]
            assert confidences == pytest.approx(expected[2])
            seen |= set(layers)
    assert len(seen) > 1, "some tokens leave"
    usual = generated(model, prompts, early)
    assert usual != generated(model, prompts, early, repetition_penalty=penalty), "it changes texts"
    full = [row[0] for row in generated(model, prompts, False, repetition_penalty=penalty)]
    lossless = dict(threshold=0.2, lossless=True)
    assert [row[0] for row in generated(model, prompts, lossless, repetition_penalty=penalty)] == full


@pytest.mark.parametrize("lossless", [False, True])
def test_an_exit_that_is_sure_of_the_end_of_a_text_that_is_too_short_is_as_sure_as_of_what_it_gives(
    model, lossless, monkeypatch
):
    thresholds = dict.fromkeys(LAYERS, 0.35)
    prompts = [model.tokenizer.text_to_ids(text) for text in TEXTS]
    early, met, left = dict(threshold=0.35, always=True), 0, 0
    for prompt in prompts:
        (tokens, layers, _) = generated(model, [prompt], early)[0]
        for place in [i for i, n in enumerate(layers) if n < 8][:3]:
            end = tokens[place]  # an exit was sure of it
            monkeypatch.setattr(model.text_tokenizer, "_other_ends", (end,))
            plain = Processed(model, least=LIMIT - 2, thresholds={} if lossless else thresholds)
            expected = plain(prompt, LIMIT)
            found = generated(
                model, [prompt], dict(threshold=0.35, lossless=True) if lossless else early, LIMIT - 2
            )[0]
            assert found[0] == expected[0] and end not in found[0][: LIMIT - 2]
            met += 1
            if lossless:
                continue
            assert found[1] == expected[1]
            early_ones = [i for i, n in enumerate(found[1]) if n < 8]
            left += len(early_ones)
            assert [found[2][i] for i in early_ones] == pytest.approx([expected[2][i] for i in early_ones])
    assert met and (lossless or left)


def test_sampled_texts_are_penalised_before_the_temperature(model):
    """The first token's frequencies, with a penalty, are those of transformers' processors and warpers."""
    from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper

    prompt, count = model.tokenizer.text_to_ids(TEXTS[0]), 3000
    sampling = dict(use_greedy=False, temperature=1.7, top_k=4, repetition_penalty=3.0)
    generator = torch.Generator().manual_seed(3)
    output = model.generate(
        [prompt] * count, dict(max_length=1), sampling, early_exit=False, generator=generator
    )
    drawn = torch.tensor([ids[-1] for ids in output["token_ids"]])
    with torch.no_grad():
        states = model.gpt.forward_states(torch.tensor([prompt]), torch.arange(len(prompt))[None], None)
        logits = (states.output[-1] @ model.gpt.output_weight().T)[:, :201]
    text = torch.tensor([prompt])
    for each in (RepetitionPenaltyLogitsProcessor(3.0), TemperatureLogitsWarper(1.7), TopKLogitsWarper(4)):
        logits = each(text, logits)
    expected = logits[0].softmax(-1)
    seen = torch.bincount(drawn, minlength=201) / count
    assert (seen - expected).abs().max() < 4 * (0.25 / count) ** 0.5
    assert set(drawn.tolist()) <= set(expected.nonzero().flatten().tolist())
