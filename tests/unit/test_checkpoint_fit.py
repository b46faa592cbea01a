# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Sharded state dicts are fitted to what a checkpoint has."""

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from nemo_ee.checkpoint import keys
from nemo_ee.checkpoint.fit import fit_to_checkpoint
from nemo_ee.checkpoint.torch_dist import TorchDistCheckpoint
from nemo_ee.errors import CheckpointError
from tests.unit.test_checkpoint_content_hash import write_torch_dist

FUSED = "model.decoder.layers.self_attention.linear_qkv.layer_norm_weight"
UNFUSED = "model.decoder.layers.input_layernorm.weight"
FC1 = "model.decoder.layers.mlp.linear_fc1.weight"


def norm(key: str, layers: int = 2, layer: int = 1) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, torch.zeros(4), (0, layer, layers), prepend_axis_num=1)


@pytest.mark.parametrize(("ours", "theirs"), [(FUSED, UNFUSED), (UNFUSED, FUSED), (FUSED, FUSED)])
def test_norms_are_found_under_either_name(tmp_path, ours, theirs):
    checkpoint = TorchDistCheckpoint(write_torch_dist(tmp_path / "c", {theirs: torch.ones(2, 4)}))
    fitted = fit_to_checkpoint({"mine": norm(ours)}, checkpoint)
    assert fitted["mine"].key == theirs


def test_spellings_of_every_fused_norm():
    for head in ("model.decoder.layers.", "model.decoder.layers.3.", "model.exits.2.block.", ""):
        for fused, plain in (
            ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
            ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
        ):
            for kind in ("weight", "bias"):
                assert keys.canonical(head + plain + kind) == head + fused + kind
                assert set(keys.spellings(head + plain + kind)) == {head + plain + kind, head + fused + kind}
                assert keys.spellings(head + fused + kind)[0] == head + fused + kind
    for other in ("model.decoder.final_layernorm.weight", "x.post_input_layernorm.weight", FC1):
        assert keys.spellings(other) == (other,)


def test_fewer_layers_than_the_checkpoint(tmp_path):
    stored = {UNFUSED: torch.ones(5, 4), FC1: torch.ones(5, 8, 4)}
    checkpoint = TorchDistCheckpoint(write_torch_dist(tmp_path / "c", stored))
    offsets = ((0, 1, 2),)
    weight = ShardedTensor.from_rank_offsets(FC1, torch.zeros(8, 4), *offsets, prepend_axis_num=1)
    state = {"norm": norm(UNFUSED), "fc1": apply_swiglu_sharded_factory(weight, offsets)}
    with pytest.raises(CheckpointError, match=r"model \(3, 4\), checkpoint \(5, 4\)"):
        fit_to_checkpoint({"norm": norm(UNFUSED, layers=3)}, checkpoint)
    fitted = fit_to_checkpoint(state, checkpoint, truncated=True)
    assert fitted["norm"].global_shape == (5, 4) and fitted["norm"].global_offset == (1, 0)
    assert fitted["norm"].axis_fragmentations == (5, 1)
    for part in fitted["fc1"].build():
        assert part.global_shape == (5, 8, 4) and part.global_offset[0] == 1
        part.validate_metadata_integrity()


def test_more_layers_than_the_checkpoint_are_refused(tmp_path):
    checkpoint = TorchDistCheckpoint(write_torch_dist(tmp_path / "c", {UNFUSED: torch.ones(2, 4)}))
    with pytest.raises(CheckpointError, match=r"model \(3, 4\), checkpoint \(2, 4\)"):
        fit_to_checkpoint({"norm": norm(UNFUSED, layers=3)}, checkpoint)


def test_extra_state_that_is_not_there_is_left_out(tmp_path):
    checkpoint = TorchDistCheckpoint(write_torch_dist(tmp_path / "c", {UNFUSED: torch.ones(2, 4)}))
    state = {
        "norm": norm(UNFUSED),
        "state": ShardedObject("model.decoder.layers.mlp.linear_fc1._extra_state", None, (2,), (0,)),
    }
    assert fit_to_checkpoint(state, checkpoint).keys() == {"norm"}


def test_skipped_prefixes_may_be_missing_and_others_may_not(tmp_path):
    checkpoint = TorchDistCheckpoint(write_torch_dist(tmp_path / "c", {UNFUSED: torch.ones(2, 4)}))
    exit_weight = ShardedTensor.from_rank_offsets("model.exits.2.norm.weight", torch.zeros(4))
    state = {"norm": norm(UNFUSED), "exit": exit_weight}
    assert fit_to_checkpoint(dict(state), checkpoint, skip=("model.exits.",)).keys() == {"norm"}
    with pytest.raises(CheckpointError, match="1 tensors .* model.exits.2.norm.weight"):
        fit_to_checkpoint(dict(state), checkpoint)


def test_vocabulary_padding_may_differ_and_widths_may_not(tmp_path):
    stored = {"model.embedding.word_embeddings.weight": torch.ones(128, 4)}
    checkpoint = TorchDistCheckpoint(write_torch_dist(tmp_path / "c", stored))
    key = "model.embedding.word_embeddings.weight"
    padded = ShardedTensor.from_rank_offsets(key, torch.zeros(256, 4), allow_shape_mismatch=True)
    assert fit_to_checkpoint({"e": padded}, checkpoint).keys() == {"e"}
    wide = ShardedTensor.from_rank_offsets(key, torch.zeros(128, 8))
    with pytest.raises(CheckpointError, match="other shapes"):
        fit_to_checkpoint({"e": wide}, checkpoint)


def test_of_padded_tensors_only_rows_of_padding_may_be_others(tmp_path):
    key = "model.embedding.word_embeddings.weight"
    checkpoint = TorchDistCheckpoint(write_torch_dist(tmp_path / "c", {key: torch.ones(128, 4)}))

    def padded(*shape: int) -> dict:
        return {"e": ShardedTensor.from_rank_offsets(key, torch.zeros(*shape), allow_shape_mismatch=True)}

    assert fit_to_checkpoint(padded(256, 4), checkpoint, least_rows=lambda key: 128).keys() == {"e"}
    with pytest.raises(CheckpointError, match=r"model \(256, 4\), checkpoint \(128, 4\)"):
        fit_to_checkpoint(padded(256, 4), checkpoint, least_rows=lambda key: 129)
    with pytest.raises(CheckpointError, match=r"model \(128, 8\), checkpoint \(128, 4\)"):
        fit_to_checkpoint(padded(128, 8), checkpoint)
