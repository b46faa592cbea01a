# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The hash depends on the backbone's weights and on nothing else; reading a checkpoint runs no code of it."""

import io
import json
import os
import pickle
import tarfile
from enum import Enum
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from nemo_ee.checkpoint import archive, torch_dist
from nemo_ee.checkpoint.content_hash import backbone_content_hash
from nemo_ee.checkpoint.legacy import read_legacy_weights
from nemo_ee.errors import CheckpointError
from tests.support.hostile_weights import write_torch_dist

LAYERS = 3
NORM = "self_attention.linear_qkv.layer_norm_weight"


def backbone(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights by canonical single-layer key."""
    generator = torch.Generator().manual_seed(seed)
    state = {"embedding.word_embeddings.weight": torch.randn(10, 4, generator=generator)}
    for n in range(LAYERS):
        state[f"decoder.layers.{n}.{NORM}"] = torch.randn(4, generator=generator)
        state[f"decoder.layers.{n}.mlp.linear_fc1.weight"] = torch.randn(8, 4, generator=generator)
    state["decoder.final_layernorm.weight"] = torch.randn(4, generator=generator)
    return state


def stacked(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As megatron-core stores it: NeMo's prefix, and layers stacked."""
    out = {f"model.{key}": value for key, value in state.items() if ".layers." not in key}
    for key in state:
        if ".layers.0." in key:
            layers = torch.stack([state[key.replace(".0.", f".{n}.")] for n in range(LAYERS)])
            out["model." + key.replace(".0.", ".")] = layers
    return out


def write_nemo(folder: Path, tensors: dict[str, torch.Tensor], name: str = "m.nemo") -> Path:
    source = folder / f"{name}.content"
    source.mkdir()
    (source / "model_config.yaml").write_text(f"name: {name}\n")
    write_torch_dist(source / "model_weights", tensors)
    return archive.write_archive(source, folder / name)


@pytest.fixture
def reference(tmp_path) -> str:
    return backbone_content_hash(write_torch_dist(tmp_path / "reference", stacked(backbone())))


def test_container_and_layout_do_not_count(tmp_path, reference):
    path = write_nemo(tmp_path, stacked(backbone()))
    assert backbone_content_hash(path) == reference
    assert backbone_content_hash(tmp_path / "m.nemo.content") == reference
    os.utime(tmp_path / "m.nemo.content" / "model_config.yaml", (1, 1))
    with tarfile.open(tmp_path / "gz.nemo", "w:gz") as tar:
        tar.add(tmp_path / "m.nemo.content", arcname=".")
    assert backbone_content_hash(tmp_path / "gz.nemo") == reference
    legacy = tmp_path / "legacy"
    legacy.mkdir()
    (legacy / "model_config.yaml").write_text("a: 1\n")
    torch.save({f"model.{key}": value for key, value in backbone().items()}, legacy / "model_weights.ckpt")
    assert backbone_content_hash(legacy) == reference


def test_spelling_of_the_layer_spec_does_not_count(tmp_path, reference):
    local = {key.replace(NORM, "input_layernorm.weight"): value for key, value in stacked(backbone()).items()}
    assert any("input_layernorm" in key for key in local)
    assert backbone_content_hash(write_torch_dist(tmp_path / "local", local)) == reference


def test_what_is_no_backbone_does_not_count(tmp_path, reference):
    more = stacked(backbone()) | {
        "model.exits.2.norm.weight": torch.randn(4),
        "optimizer.state.exp_avg.model.decoder.final_layernorm.weight": torch.randn(4),
        "model.decoder.layers.mlp.linear_fc1._extra_state": torch.randn(2),
    }
    assert backbone_content_hash(write_torch_dist(tmp_path / "more", more)) == reference


def test_padding_of_the_vocabulary_does_not_count(tmp_path, reference):
    state = stacked(backbone())
    key = "model.embedding.word_embeddings.weight"
    state[key] = torch.cat((state[key], torch.zeros(6, 4)))
    assert backbone_content_hash(write_torch_dist(tmp_path / "padded", state)) == reference


@pytest.mark.parametrize("key", sorted(stacked(backbone())))
def test_one_bit_of_any_tensor_counts(tmp_path, reference, key):
    state = stacked(backbone())
    state[key].view(torch.int32).view(-1)[-1] ^= 1
    assert backbone_content_hash(write_torch_dist(tmp_path / "changed", state)) != reference


def test_precision_and_names_count(tmp_path, reference):
    half = {key: value.bfloat16() for key, value in stacked(backbone()).items()}
    assert backbone_content_hash(write_torch_dist(tmp_path / "half", half)) != reference
    fewer = stacked(backbone())
    fewer.pop("model.decoder.final_layernorm.weight")
    assert backbone_content_hash(write_torch_dist(tmp_path / "fewer", fewer)) != reference


def test_tensors_and_slices_are_read_whole(tmp_path):
    state = stacked(backbone()) | {"model.scalar": torch.tensor(3.0), "model.half": torch.randn(5).bfloat16()}
    checkpoint = torch_dist.TorchDistCheckpoint(write_torch_dist(tmp_path / "c", state))
    assert checkpoint.tensors.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(checkpoint.read(key), value)
    key = "model.decoder.layers.mlp.linear_fc1.weight"
    for layer in range(LAYERS):
        assert torch.equal(checkpoint.read(key, first=layer), state[key][layer])


def test_join_keeps_every_tensor_and_the_hash(tmp_path, reference):
    exits = {"model.exits.2.norm.weight": torch.randn(4)}
    parts = [
        torch_dist.TorchDistCheckpoint(write_torch_dist(tmp_path / "a", stacked(backbone()))),
        torch_dist.TorchDistCheckpoint(write_torch_dist(tmp_path / "b", exits)),
    ]
    torch_dist.join(parts, tmp_path / "joined")
    joined = torch_dist.TorchDistCheckpoint(tmp_path / "joined")
    for key, value in (stacked(backbone()) | exits).items():
        assert torch.equal(joined.read(key), value)
    assert backbone_content_hash(tmp_path / "joined") == reference
    # torch's own reader finds the same
    target = {key: torch.zeros_like(value) for key, value in exits.items()}
    dcp.load(target, checkpoint_id=tmp_path / "joined", no_dist=True)
    assert torch.equal(target["model.exits.2.norm.weight"], exits["model.exits.2.norm.weight"])


def test_join_refuses_a_key_in_both(tmp_path):
    parts = [
        torch_dist.TorchDistCheckpoint(write_torch_dist(tmp_path / name, {"model.x": torch.ones(2)}))
        for name in "ab"
    ]
    with pytest.raises(CheckpointError, match="model.x"):
        torch_dist.join(parts, tmp_path / "joined")


class Evil:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def test_hostile_metadata_is_refused_and_not_run(tmp_path):
    directory = write_torch_dist(tmp_path / "c", stacked(backbone()))
    (directory / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="does not belong to the torch_dist format"):
        backbone_content_hash(directory)
    assert not (tmp_path / "ran").exists()


class EnumsByName(pickle.Pickler):
    """As Python 3.11.2, Debian 12's, pickles members of enums."""

    def reducer_override(self, obj: object):
        return (getattr, (type(obj), obj.name)) if isinstance(obj, Enum) else NotImplemented


class PathsUnlink:
    def __reduce__(self):
        return (getattr, (Path, "unlink"))


def test_metadata_of_python_3_11_2_is_read(tmp_path, reference):
    directory = write_torch_dist(tmp_path / "c", stacked(backbone()))
    written = pickle.loads((directory / ".metadata").read_bytes())  # noqa: S301
    with open(directory / ".metadata", "wb") as file:
        EnumsByName(file).dump(written)
    assert b"getattr" in (directory / ".metadata").read_bytes()
    assert backbone_content_hash(directory) == reference
    written.mcore_data = PathsUnlink()
    (directory / ".metadata").write_bytes(pickle.dumps(written))
    with pytest.raises(CheckpointError, match="getattr of anything but an enum"):
        backbone_content_hash(directory)


def test_hostile_common_state_is_refused_and_not_run(tmp_path):
    """megatron-core would unpickle it; no checkpoint gets that far that was not opened here before."""
    directory = write_torch_dist(tmp_path / "c", stacked(backbone()))
    torch.save({"iteration": Evil(tmp_path / "ran")}, directory / "common.pt")
    with pytest.raises(CheckpointError, match="common.pt cannot be trusted"):
        torch_dist.TorchDistCheckpoint(directory)
    assert not (tmp_path / "ran").exists()


def test_legacy_weights_may_hold_byte_buffers(tmp_path, reference):
    """Transformer Engine's extra state."""
    (tmp_path / "model_config.yaml").write_text("a: 1\n")
    state = {f"model.{key}": value for key, value in backbone().items()}
    state["model.decoder.layers.0.mlp.linear_fc1._extra_state"] = io.BytesIO(b"scales")
    torch.save(state, tmp_path / "model_weights.ckpt")
    assert read_legacy_weights(tmp_path / "model_weights.ckpt").keys() == state.keys()
    assert backbone_content_hash(tmp_path) == reference


def test_legacy_weights_that_are_none(tmp_path):
    file = tmp_path / "model_weights.ckpt"
    torch.save([1, 2], file)
    with pytest.raises(CheckpointError, match="holds no weights by name"):
        read_legacy_weights(file)
    file.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="copy it again"):
        read_legacy_weights(file)


def test_hostile_legacy_weights_are_refused_and_not_run(tmp_path):
    (tmp_path / "model_config.yaml").write_text("a: 1\n")
    torch.save({"model.x": Evil(tmp_path / "ran")}, tmp_path / "model_weights.ckpt")
    with pytest.raises(CheckpointError, match="model_weights.ckpt"):
        backbone_content_hash(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "common.pt", "__0_0.distcp"])
def test_missing_and_truncated_files_are_named(tmp_path, name):
    directory = write_torch_dist(tmp_path / "c", stacked(backbone()))
    whole = (directory / name).read_bytes()
    (directory / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        backbone_content_hash(directory)
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        backbone_content_hash(directory)


def test_another_backend_is_named(tmp_path):
    directory = write_torch_dist(tmp_path / "c", stacked(backbone()))
    (directory / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(CheckpointError, match="sharded_backend=zarr"):
        backbone_content_hash(directory)


def test_data_files_outside_the_checkpoint_are_refused(tmp_path):
    directory = write_torch_dist(tmp_path / "c", {"model.x": torch.ones(2)})
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../elsewhere.distcp"
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="outside"):
        backbone_content_hash(directory)
