# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Draft models: transformers computes what the exits of the checkpoint compute, each kind as exactly as is said."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_ee.checkpoint.stored_tensors import StoredTensor
from nemo_ee.errors import CheckpointError, ConfigError
from nemo_ee.export.export import export
from nemo_ee.export.settings import ExportConfig
from nemo_ee.report.schema import Report
from nemo_ee.report.serialise import to_json
from tests.support.engine_rules import fused, parameters
from tests.support.exported_exits import KINDS, tokens, write_all
from tests.support.fake_report import fake_exits, fake_metadata, fake_threshold

VARIANTS = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "share_embeddings_and_output_weights": False, "kv_channels": 16},
}
"""Of the tiny model."""
FOLDED = [layer for layer, head in KINDS.items() if head["linear"]]
SCALED = [*FOLDED, 7]


@pytest.fixture(scope="module")
def made(workers, tmp_path_factory):
    """The folder of the checkpoints, and their exits' logits."""
    folder = tmp_path_factory.mktemp("exits")
    return folder, workers(1).run(write_all, str(folder), VARIANTS)[0]


def exported(folder: Path, variant: str, layer: int | None, name: str = "", **settings):
    """The folder of a draft. Exits of odd layers come from their own file, others from the whole checkpoint."""
    output = folder / f"{variant}_{layer}{name}"
    values = dict(
        kind="draft",
        gpt_model_file=str(folder / f"{variant}.nemo"),
        adapter_file=str(folder / f"{variant}_exits.nemo") if (layer or 0) % 2 else None,
        output_path=str(output),
        layer=layer,
    )
    export(ExportConfig.from_dict({**values, **settings}))
    return output


@torch.no_grad()
def loaded_logits(folder: Path, **settings) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    assert not any(report.values()), report
    return model.eval()(tokens()).logits


def tokens_of(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layer", KINDS)
def test_a_draft_says_what_its_exit_says(made, variant, layer):
    folder, expected = made
    ours, head = expected[variant][layer], KINDS[layer]
    theirs = loaded_logits(exported(folder, variant, layer))
    listed = ours.isfinite().all(0).all(0)
    assert int(listed.sum()) == (61 if head["projection"] == "shortlist" else 201)
    # the order of the exit's own tokens is its own; rows of the base beside a shortlist are an approximation
    assert torch.equal(tokens_of(theirs[..., listed]), tokens_of(ours[..., listed]))
    theirs, ours = theirs[..., listed], ours[..., listed]
    if layer in SCALED:
        factors = (theirs * ours).sum(-1, keepdim=True) / ours.square().sum(-1, keepdim=True)
        assert factors.min() > 0
        theirs = theirs / factors
    # fp32: sums of a few hundred terms of order 1; logits are of order 10
    assert (theirs - ours).abs().max() < (1e-3 if layer in FOLDED else 1e-4)


def test_what_a_draft_is_can_be_read(made):
    folder, _ = made
    for variant, layer, wanted in (
        ("llama", 5, dict(architectures=["LlamaForCausalLM"], mlp_bias=True, attention_bias=False)),
        ("llama", 2, dict(architectures=["LlamaForCausalLM"], mlp_bias=False, tie_word_embeddings=True)),
        ("qwen2", 5, dict(architectures=["LlamaForCausalLM"], mlp_bias=True, attention_bias=True)),
        ("qwen2", 4, dict(architectures=["Qwen2ForCausalLM"], tie_word_embeddings=False)),
    ):
        output = exported(folder, variant, layer, "_read")
        config = json.loads((output / "config.json").read_text())
        assert wanted.items() <= config.items() and config["vocab_size"] == 201
        extra = (
            KINDS[layer].get("block", False) + (KINDS[layer]["mlp"] == "residual") + KINDS[layer]["linear"]
        )
        assert config["num_hidden_layers"] == layer + extra
        assert config["intermediate_size"] == (96 + 64 if layer in FOLDED else 96)
        card = (output / "README.md").read_text()
        assert ("one positive factor" in card) == (layer in SCALED) and "assistant_model=draft" in card
    shortlisted = (exported(folder, "llama", 8, "_card") / "README.md").read_text()
    assert "Approximate: the exit has rows for 61 tokens" in shortlisted
    assert "among its shortlist's tokens is the exit's own" in shortlisted


def test_rows_that_are_the_bases_own_are_not_written_twice(made):
    """The shortlist's rows of the Llama, replaced by those of its embedding."""
    from nemo_ee.export.draft import build_draft
    from nemo_ee.export.source import opened

    folder, _ = made
    values = dict(kind="draft", gpt_model_file=str(folder / "llama.nemo"), output_path="unused", layer=8)
    with opened(ExportConfig.from_dict(values)) as source:
        assert not build_draft(source, 8).tied
        name = "exits.8.projection.weight"
        ids = source.tensors["exits.8.projection.token_ids"].read()
        rows = source.tensors["embedding.word_embeddings.weight"].read()[ids]
        frozen = {**source.tensors, name: StoredTensor(tuple(rows.shape), rows.dtype, lambda: rows)}
        draft = build_draft(replace(source, tensors=frozen), 8)
    assert draft.tied and "lm_head.weight" not in draft.weights


@pytest.mark.parametrize("bad", [-1, 201])
def test_a_shortlist_of_other_tokens_is_refused(made, bad):
    """Which would be written over another token's row, or over none."""
    from nemo_ee.export.draft import build_draft
    from nemo_ee.export.source import opened

    values = dict(kind="draft", gpt_model_file=str(made[0] / "llama.nemo"), output_path="unused", layer=8)
    with opened(ExportConfig.from_dict(values)) as source:
        name = "exits.8.projection.token_ids"
        ids = source.tensors[name].read().clone()
        ids[0 if bad < 0 else -1] = bad
        tensors = {**source.tensors, name: replace(source.tensors[name], read=lambda: ids)}
        with pytest.raises(CheckpointError, match="token_ids must name distinct tokens of 201"):
            build_draft(replace(source, tensors=tensors), 8)


def test_in_bfloat16_it_is_the_same_but_for_rounding(made):
    """A fold in bf16 beside its own weights, rounded, in float32: what half precision costs plain Llamas, too."""
    folder, _ = made
    for layer in (2, 5):
        output = exported(folder, "llama", layer, "_bf16", precision="bf16")
        rounded = loaded_logits(output, torch_dtype=torch.float32)
        half = loaded_logits(output, torch_dtype=torch.bfloat16).float()
        agree = (tokens_of(half) == tokens_of(rounded)).float().mean()
        assert agree > 0.9, (layer, agree)


REFUSED = {
    "folded for SGLang": (
        5,
        {"engines": ["transformers", "sglang"]},
        r"SGLang drops the biases.*set engines=\[transformers\], or tune exits",
    ),
    "folded in float16": (6, {"precision": 16}, "precision=16: .*set precision=bf16"),
    "folded as Mistral": (
        5,
        {"architecture": "mistral"},
        "architecture=mistral: .*which .* llama alone may have",
    ),
    "no such exit": (
        9,
        {},
        r"layer=9: must be one of the exits of llama_exits.nemo, which are at \[1, 2.*set layer=1",
    ),
    "which exit": (None, {}, "layer=null: must be one of the exits of llama.nemo"),
    "unknown engine": (1, {"engines": ["tensorrt"]}, "engines=.*must be of transformers, vllm"),
    "another base's exits": (1, {"gpt_model_file": "qwen2.nemo"}, "made for the base llama.nemo"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_wrong_is_refused_and_leaves_nothing(made, case):
    folder, _ = made
    layer, settings, words = REFUSED[case]
    if "gpt_model_file" in settings:
        settings = {"gpt_model_file": str(folder / settings["gpt_model_file"])}
    with pytest.raises((ConfigError, CheckpointError), match=words):
        exported(folder, "llama", layer, "_refused", **settings)
    assert not list(folder.glob("*_refused")) and not list(folder.glob(".*_refused*"))


def test_the_card_shows_what_was_measured_of_the_same_files(made, tmp_path):
    folder, _ = made
    about = replace(fake_metadata(), model="llama.nemo", adapter="llama_exits.nemo")
    report = Report(about, fake_exits(tuple(KINDS)), 3.0, None, (fake_threshold(0.5),), prompts="prompts")
    path = tmp_path / "report.json"

    def card(**changes):
        path.write_text(to_json(replace(report, **changes), "report"))
        return (
            exported(folder, "llama", 1, "_card", report_file=str(path), overwrite=True) / "README.md"
        ).read_text()

    said = card()
    mine, others = report.exits[0], [f"{each.loss:.3f} [" for each in report.exits[1:]]
    assert (
        "0123abc" in said and f"| 1 | {mine.loss:.3f} [" in said and not any(loss in said for loss in others)
    )
    with pytest.raises(ConfigError, match="report_file=.*is of llama.nemo with exits.nemo .*evaluate again"):
        card(metadata=replace(about, adapter="exits.nemo"))
    with pytest.raises(ConfigError, match="report_file=.*is of version 1, .*evaluate again"):
        card(version=1)
    path.write_text('{"metadata": {}}')
    with pytest.raises(ConfigError, match="report_file=.*is no report.json of this version .*evaluate again"):
        exported(folder, "llama", 1, "_none", report_file=str(path))
    with pytest.raises(ConfigError, match="report_file=.*cannot be read"):
        exported(folder, "llama", 1, "_none", report_file=str(tmp_path / "nothing"))


def test_sglang_is_fine_with_what_has_no_biases(made):
    folder, _ = made
    card = (exported(folder, "llama", 2, "_sglang", engines=["sglang"]) / "README.md").read_text()
    assert "STANDALONE" in card and "vllm" not in card


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layer", KINDS)
def test_engines_have_a_parameter_for_every_weight_and_the_other_way_round(made, variant, layer):
    output = exported(made[0], variant, layer, "_sharded", max_shard_size="100KB")
    config = json.loads((output / "config.json").read_text())
    index = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {file.name for file in output.glob("*.safetensors")}, (
        "vLLM reads all of them"
    )
    names = {fused(name) for name in index}
    assert names == parameters(config, "vllm")
    assert (names == parameters(config, "sglang")) == (layer not in FOLDED), "for which SGLang is refused"
    assert config["vocab_size"] == 201 and config["head_dim"] == (8 if variant == "llama" else 16)
