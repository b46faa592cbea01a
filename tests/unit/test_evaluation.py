# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Evaluation against slow references: scores of all exits, held-out quality, the sweep of thresholds."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from nemo_ee.config import EarlyExitConfig, InferenceConfig
from nemo_ee.decoding.cpu.cpu_kernels import SWITCH
from nemo_ee.errors import ConfigError, DataError
from nemo_ee.evaluation import exit_thresholds, held_out, settings, sweep
from nemo_ee.evaluation.teacher_forced import ExitScores, TextScores, score_text
from nemo_ee.report import provenance
from tests.support.tiny_gpt import HEADS, VOCABULARY, tiny_model, tiny_model_config
from tests.support.uncached import exit_log_probs, generate_uncached

LAYERS = (2, 4, 6)


def build(head):
    config = tiny_model_config(head=HEADS[head], share_embeddings_and_output_weights=False)
    return tiny_model(config, dtype=torch.float64)


@pytest.fixture(scope="module")
def shortlist_model():
    return build("linear, shortlist")


@pytest.fixture(scope="module")
def block_model():
    return build("block, MLP, linear, untied")


def tokens(rows, length, seed=0):
    return torch.randint(6, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["shortlist_model", "block_model"])
def test_scores_equal_plain_softmax(name, request):
    model = request.getfixturevalue(name)
    text = tokens(3, 21)
    ids, labels = text[:, :-1], text[:, 1:]
    with torch.no_grad():
        scores = score_text(model.gpt, ids, labels)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        final = model.gpt(ids, positions, None)[..., :VOCABULARY].log_softmax(-1)
        torch.testing.assert_close(scores.final.losses, -final.gather(-1, labels[..., None])[..., 0])
        assert torch.equal(scores.final.tokens, final.argmax(-1)) and not scores.final.bucket_wins.any()
        for layer in LAYERS:
            log_probs, mine = exit_log_probs(model, layer, ids), scores.exits[layer]
            emitted = log_probs[..., :VOCABULARY]
            column = torch.where(
                emitted.gather(-1, labels[..., None])[..., 0] == -math.inf, VOCABULARY, labels
            )
            expected = -log_probs.gather(-1, column[..., None])[..., 0]
            torch.testing.assert_close(mine.losses, expected)
            assert torch.equal(mine.tokens, emitted.argmax(-1))
            torch.testing.assert_close(mine.confidences, emitted.amax(-1).exp())
            assert torch.equal(mine.bucket_wins, log_probs.argmax(-1) == VOCABULARY)
    if name == "shortlist_model":
        wins = torch.stack([scores.exits[n].bucket_wins for n in LAYERS])
        assert wins.any() and not wins.all(), "the case must be tried"


def scores_of(tokens_, confidences):
    shape = torch.tensor(tokens_).shape
    return ExitScores(
        torch.tensor(tokens_),
        torch.tensor(confidences),
        torch.zeros(shape),
        torch.zeros(shape, dtype=torch.bool),
    )


def test_a_token_leaves_at_the_first_sure_exit():
    scores = TextScores(
        scores_of([[1, 1, 1, 1]], [[0.1] * 4]),
        {
            2: scores_of([[2, 2, 2, 2]], [[0.9, 0.5, 0.6, 0.2]]),
            4: scores_of([[4, 4, 4, 4]], [[0.9, 0.8, 0.75, 0.6]]),
        },
    )
    chosen, layers = scores.leaving({2: 0.5, 4: 0.75})
    assert chosen.tolist() == [[2, 4, 2, 1]] and layers.tolist() == [[2, 4, 2, 0]]
    chosen, layers = scores.leaving({4: 0.75})
    assert chosen.tolist() == [[4, 4, 1, 1]] and layers.tolist() == [[4, 4, 0, 0]]


def write_text(prefix, documents):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for row in documents:
        builder.add_document(np.array(row), [len(row)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_held_out_sequences_are_evenly_spaced_and_disjoint(tmp_path):
    prefix = write_text(tmp_path / "text", [range(0, 60), range(60, 101)])
    found = held_out.held_out_sequences(prefix, 3, 10, 200)
    assert found.shape == (3, 11) and found[:, 0].tolist() == [0, 30, 60]
    assert torch.equal(found[1], torch.arange(30, 41))
    assert len(held_out.held_out_sequences(prefix, 99, 10, 200)) == 10, "no more than the text has"
    with pytest.raises(DataError, match="at least one sequence"):
        held_out.held_out_sequences(prefix, 3, 101, 200)


def test_document_prompts_are_beginnings_of_long_enough_documents(tmp_path):
    prefix = write_text(tmp_path / "text", [range(0, 5), range(10, 30), range(40, 44), range(50, 70)])
    data = settings.HeldOutConfig(prefix)
    assert sweep.document_prompts(data, 9, 5) == [list(range(10, 15)), list(range(50, 55))]
    with pytest.raises(DataError, match="prompt_tokens=20"):
        sweep.document_prompts(data, 1, 20)


def test_quality_is_the_mean_over_all_tokens(shortlist_model):
    text = tokens(5, 17, seed=3)

    def score(ids, labels):
        with torch.no_grad():
            return score_text(shortlist_model.gpt, ids, labels)

    quality = held_out.measure_quality(score, text.split(2), seed=0)
    whole = score(text[:, :-1], text[:, 1:])
    assert quality.final_loss == pytest.approx(whole.final.losses.mean().item())
    assert quality.final_loss_ci.low < quality.final_loss < quality.final_loss_ci.high
    for each, layer in zip(quality.exits, LAYERS, strict=True):
        exit_ = whole.exits[layer]
        equal = exit_.tokens == whole.final.tokens
        assert each.layer == layer and each.tokens == 5 * 16
        assert each.loss == pytest.approx(exit_.losses.mean().item())
        assert each.agreement == pytest.approx(equal.double().mean().item())
        assert each.strict_agreement == pytest.approx((equal & ~exit_.bucket_wins).double().mean().item())
        assert each.mean_confidence == pytest.approx(exit_.confidences.mean().item())


def test_sweep_equals_brute_force(block_model, monkeypatch):
    monkeypatch.setenv(SWITCH, "0")  # heads in full
    prompts = tokens(3, 7, seed=5).tolist()
    prompts[1] = prompts[1][:4]
    thresholds = (0.3, 0.6, 1.0, (0.2, 1.0, 0.5), "calibrated")
    options = settings.SweepConfig(
        tokens_to_generate=12, thresholds=thresholds, timed_prompts=2, repeats=2, sample_threshold=0.6
    )
    inference = dataclasses.replace(block_model.early_exit.inference, threshold=(1.0, 0.4, 0.3))
    own = dataclasses.replace(block_model.early_exit, inference=inference)
    monkeypatch.setattr(block_model, "early_exit", own)
    calls = []
    run = sweep.Sweep(block_model, prompts, options, seed=0, advance=lambda: calls.append(1))
    results = run.run()
    assert len(calls) == sweep.Sweep.generations(options, len(prompts))
    gpt, final = block_model.gpt, block_model.cfg.num_layers
    full = [generate_uncached(gpt, prompt, 12, {}).tokens for prompt in prompts]
    assert [text.tokens for text in run.texts[None]] == full
    assert [result.name for result in results] == [
        "0.3",
        "0.6",
        "1",
        "0.2, 1, 0.5",
        "calibrated (1, 0.4, 0.3)",
    ]
    for way, result in zip(thresholds, results, strict=True):
        exits = dict(zip(LAYERS, result.thresholds, strict=True))
        early = [generate_uncached(gpt, prompt, 12, exits) for prompt in prompts]
        assert [text.tokens for text in run.texts[way]] == [each.tokens for each in early]
        left = [layer for each in early for layer in each.exit_layers]
        for layer in (*LAYERS, final):
            assert result.share_per_exit[layer] == pytest.approx(left.count(layer) / len(left))
        equal = []
        for prompt, continuation in zip(prompts, full, strict=True):
            for i in range(1, len(continuation)):
                seen = torch.tensor([prompt + continuation[:i]])
                equal.append(first_sure(block_model, seen, exits) in (None, continuation[i]))
        assert result.agreement == pytest.approx(sum(equal) / len(equal))
        expected = perplexity(block_model, prompts, [each.tokens for each in early])
        assert result.perplexity == pytest.approx(expected)
        assert result.full_depth_perplexity == pytest.approx(perplexity(block_model, prompts, full))
        assert result.speedup.median > 0 and result.full_depth_tokens_per_second.median > 0
    assert results[0].agreement < 1.0 and results[2].agreement == 1.0, "the case must be tried"
    for each in run.quality.exits:
        right = [
            token == wanted
            for prompt, continuation in zip(prompts, full, strict=True)
            for token, wanted in zip(
                said(block_model, each.layer, prompt + continuation, len(prompt)),
                continuation[1:],
                strict=True,
            )
        ]
        assert each.tokens == len(right) and each.agreement == pytest.approx(sum(right) / len(right))
    assert [each.layer for each in run.quality.exits] == list(LAYERS)
    sample = run.samples()[0]
    assert "".join(sample.tokens) == block_model.tokenizer.ids_to_text(run.texts[0.6][0].tokens)
    run.names = ["a question", "another", "a third"]
    assert [each.prompt for each in run.samples()] == ["a question", "another"]


@torch.no_grad()
def said(model, layer, ids, first):
    """The most probable token of an exit behind each token from `first` on, but the last one."""
    return exit_log_probs(model, layer, torch.tensor([ids]))[0, first:-1, :VOCABULARY].argmax(-1).tolist()


@torch.no_grad()
def first_sure(model, ids, thresholds):
    """The token of the first exit that is sure at the last position, or None."""
    for layer in LAYERS:
        probabilities = exit_log_probs(model, layer, ids)[0, -1, :VOCABULARY].exp()
        if thresholds[layer] < 1.0 and probabilities.max() > thresholds[layer]:
            return probabilities.argmax().item()
    return None


@torch.no_grad()
def perplexity(model, prompts, continuations):
    losses = []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        ids = torch.tensor([prompt + continuation])
        logits = model.gpt(ids, torch.arange(ids.shape[1])[None], None)[0, :, :VOCABULARY].log_softmax(-1)
        losses += [-logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(continuation)]
    return math.exp(sum(losses) / len(losses))


def test_settings_report_every_fault():
    values = {
        "gpt_model_file": "???",
        "data": {"prefix": "text", "sequences": 0},
        "generation": {"thresholds": [0.9, 0.5], "repeat": 3},
    }
    with pytest.raises(ConfigError) as error:
        settings.EvaluationConfig.from_dict(values)
    assert "gpt_model_file=null: is required" in str(error.value)
    assert "generation.repeat=3: unknown key; did you mean repeats?" in str(error.value)
    values = {
        "gpt_model_file": "m.nemo",
        "data": {"prefix": "text", "sequences": 0},
        "generation": {
            "thresholds": [0.9, 1.5, 0.9, [0.5, -1], "calibratd"],
            "tokens_to_generate": 1,
            "sample_threshold": 0.8,
            "prompts": ["a text"],
            "chat_prompts_file": "chats.txt",
        },
    }
    with pytest.raises(ConfigError) as error:
        settings.EvaluationConfig.from_dict(values)
    for part in (
        "data.sequences=0",
        "each once",
        "1.5: a confidence",
        "-1.0]: a confidence",
        "did you mean calibrated?",
        "tokens_to_generate=1",
        "sample_threshold=0.8",
    ):
        assert part in str(error.value)
    for part in ("generation.chat_prompts_file=chats.txt: with generation.prompts",):
        assert part in str(error.value)


def test_thresholds_fit_the_checkpoint():
    def faults_of(thresholds, **more):
        faults = []
        used = more.pop("used", None)
        early_exit = EarlyExitConfig(layers=LAYERS, inference=InferenceConfig(**more))
        sweep_ = settings.SweepConfig(thresholds=thresholds, exits=used)
        found = exit_thresholds.resolved_thresholds(sweep_, early_exit, faults)
        return [each.values for each in found.values()], " ".join(map(str, faults))

    assert faults_of((0.5, (0.1, 0.2, 0.3))) == ([(0.5,) * 3, (0.1, 0.2, 0.3)], "")
    assert "[0.1, 0.2]: 2 thresholds for 3 exits" in faults_of(((0.1, 0.2),))[1].replace("(", "[").replace(
        ")", "]"
    )
    assert "was never calibrated" in faults_of(("calibrated",))[1]
    assert "was never calibrated" in faults_of(("calibrated",), threshold=0.8)[1], (
        "what training wrote by default"
    )
    assert faults_of(("calibrated",), threshold=0.6) == ([(0.6, 0.6, 0.6)], "")
    own = {"threshold": (0.7, 0.4), "exits": (2, 6)}
    assert faults_of(("calibrated",), **own)[0] == [(0.7, 1.0, 0.4)], (
        "an exit that it does not use is not asked"
    )
    assert faults_of(("calibrated",), used=(6,), **own)[0] == [(0.4,)]
    assert (
        "are of confidence=entropy"
        in faults_of(("calibrated",), threshold=(0.5,) * 3, confidence="entropy")[1]
    )


def test_command_shows_no_directories_outside_the_clone(monkeypatch):
    script = provenance._ROOT / "scripts" / "evaluate_early_exit.py"
    monkeypatch.setattr("sys.argv", [str(script), "data.prefix=/some/where/text", "seed=1"])
    assert provenance.command() == "python scripts/evaluate_early_exit.py data.prefix=text seed=1"
