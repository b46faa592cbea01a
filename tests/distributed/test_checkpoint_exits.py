# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Exits saved alone load at any TP and PP, only onto their base, and merge without touching it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from nemo_ee.checkpoint import archive
from nemo_ee.checkpoint.content_hash import backbone_content_hash
from nemo_ee.checkpoint.exits import adapter
from nemo_ee.checkpoint.torch_dist import TorchDistCheckpoint
from nemo_ee.errors import CheckpointError
from tests.support import tiny_llama
from tests.support.hostile_weights import write_torch_dist

EXITS = {
    "layers": [1, 2, 3],
    "init": "random",
    "head": {"block": True, "mlp": True, "projection": "untied", "train_projection": True},
}


def write_base(source: str, path: str) -> None:
    from nemo_ee.checkpoint.conversion.convert import convert_to_nemo

    convert_to_nemo(source, path)


def restore_with_fresh_exits(base: str, tp: int = 1, pp: int = 1, early_exit: dict | None = None):
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel as Model
    from tests.support.tiny_nemo import tiny_trainer

    config = Model.add_exits(Model.restore_from(base, return_config=True), early_exit or EXITS)
    config.tensor_model_parallel_size, config.pipeline_model_parallel_size = tp, pp
    return Model.restore_from(base, override_config_path=config, trainer=tiny_trainer(tp * pp))


def global_exits(path: str) -> dict[str, torch.Tensor]:
    """Every tensor of an adapter, unsharded."""
    root = archive.extract(path, path + ".content")
    checkpoint = TorchDistCheckpoint(root / "model_weights")
    return {key: checkpoint.read(key) for key in checkpoint.tensors}


def assert_same_exits(one: str, other: str) -> None:
    """Equality of every tensor; of a projection's rows those of tokens, since their padding depends on TP."""
    expected, found = global_exits(one), global_exits(other)
    assert expected and expected.keys() == found.keys()
    for key, value in expected.items():
        rows = tiny_llama.config().vocab_size if "projection" in key else None
        assert value[:rows].abs().max() > 0
        assert torch.equal(value[:rows], found[key][:rows]), key


def save_random_exits(base: str, path: str, tp: int, pp: int) -> list[str]:
    model = restore_with_fresh_exits(base, tp, pp)
    with torch.no_grad():
        for parameter in model.gpt.exits.parameters():
            parameter.normal_()
    model.save_adapters(path)
    return sorted(model.get_peft_state_dict())


def load_and_save_exits(base: str, path: str, again: str, tp: int, pp: int) -> None:
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel as Model
    from tests.support.tiny_nemo import tiny_trainer

    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    model = Model.restore_with_exits(base, path, tiny_trainer(tp * pp), sizes)
    model.save_adapters(again)


def restore_and_save(path: str, whole: str, exits: str) -> list[int]:
    """Restores a merged file by itself and saves it twice: whole, and its exits."""
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel as Model
    from tests.support.tiny_nemo import tiny_trainer

    model = Model.restore_from(path, trainer=tiny_trainer())
    model.save_to(whole)
    model.save_adapters(exits)
    return list(model.early_exit.layers)


def load_refused(base: str, path: str, early_exit: dict | None = None) -> tuple[str, bool]:
    """The error of loading an adapter, and whether the model was left as it was."""
    model = restore_with_fresh_exits(base, early_exit=early_exit)
    before = {key: value.clone() for key, value in model.gpt.state_dict().items() if value is not None}
    try:
        model.load_adapters(path)
    except CheckpointError as error:
        after = model.gpt.state_dict()
        return str(error), all(torch.equal(after[key], value) for key, value in before.items())
    return "", False


def truncated_gaps(base: str) -> dict[str, float]:
    """Restores whole and up to layer 2 only; differences of the weights that both have, by name."""
    from nemo_ee.models.megatron_gpt_ee_tuning_model import MegatronGPTEETuningModel as Tuning
    from tests.support.tiny_nemo import tiny_trainer

    size = torch.distributed.get_world_size()
    whole = restore_with_fresh_exits(base, tp=size)
    early_exit = {
        "layers": [1, 2],
        "init": "copy",
        "tuning": {"ce_weight": 1.0, "kl_weight": 0.0, "argmax_weight": 0.0},
    }
    early_exit["head"] = {"mlp": True, "linear": False, "projection": "tied"}
    config = Tuning.add_exits(Tuning.restore_from(base, return_config=True), early_exit)
    config.tensor_model_parallel_size = size
    part = Tuning.restore_from(base, override_config_path=config, trainer=tiny_trainer(size))
    assert (len(part.gpt.decoder.layers), len(whole.gpt.decoder.layers)) == (2, 4)
    ours, theirs = dict(whole.gpt.named_parameters()), dict(part.gpt.named_parameters())
    names = [name for name in theirs if name in ours and not name.startswith("exits.")]
    assert any("layers.1.mlp.linear_fc1" in name for name in names)
    return {name: (ours[name] - theirs[name]).abs().max().item() for name in names}


@pytest.fixture(scope="module")
def base(tmp_path_factory, workers) -> Path:
    folder = tmp_path_factory.mktemp("base")
    source = tiny_llama.write(folder / "hf")
    workers(1).run(write_base, str(source), str(folder / "base.nemo"))
    return folder / "base.nemo"


@pytest.fixture(scope="module")
def exits(base, workers) -> Path:
    """Random exits saved by TP2 x PP2; no shard of them is like another."""
    path = base.with_name("exits.nemo")
    owned = workers(4).run(save_random_exits, str(base), str(path), 2, 2)
    assert all(key.startswith("model.exits.") for rank in owned for key in rank)
    assert owned[0] != owned[3], "the stages hold different exits"
    return path


def test_an_adapter_is_small_and_names_its_base(base, exits):
    config = archive.read_config(exits)
    assert config.base.name == "base.nemo"
    assert config.base.content_hash == backbone_content_hash(base)
    assert list(config.early_exit.layers) == [1, 2, 3]
    assert all(key.startswith("model.exits.") for key in global_exits(str(exits)))


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (1, 2), (2, 1)])
def test_exits_reshard(base, exits, workers, tmp_path, tp, pp):
    again = str(tmp_path / "again.nemo")
    workers(tp * pp).run(load_and_save_exits, str(base), str(exits), again, tp, pp)
    assert_same_exits(str(exits), again)
    assert archive.read_config(again).base == archive.read_config(exits).base


def test_merged_is_base_plus_exits(base, exits, workers, tmp_path):
    merged = adapter.merge(base, exits, tmp_path / "merged.nemo")
    assert backbone_content_hash(merged) == backbone_content_hash(base)
    whole, alone = str(tmp_path / "whole.nemo"), str(tmp_path / "alone.nemo")
    assert workers(1).run(restore_and_save, str(merged), whole, alone)[0] == [1, 2, 3]
    assert backbone_content_hash(whole) == backbone_content_hash(base)
    assert_same_exits(str(exits), alone)
    assert archive.read_config(alone).base.content_hash == backbone_content_hash(base)
    twice, again = adapter.merge(merged, exits, tmp_path / "twice.nemo"), str(tmp_path / "again.nemo")
    assert workers(1).run(restore_and_save, str(twice), whole, again)[0] == [1, 2, 3]
    assert_same_exits(str(exits), again)
    assert backbone_content_hash(twice) == backbone_content_hash(base)


def test_another_base_is_refused(base, exits, workers, tmp_path):
    source = tiny_llama.write(tmp_path / "hf", seed=5)
    other = tmp_path / "other.nemo"
    workers(1).run(write_base, str(source), str(other))
    message, unchanged = workers(1).run(load_refused, str(other), str(exits))[0]
    for word in (backbone_content_hash(base), backbone_content_hash(other), "base.nemo", "other.nemo"):
        assert word in message
    assert unchanged
    with pytest.raises(CheckpointError, match=backbone_content_hash(other)):
        adapter.merge(other, exits, tmp_path / "merged.nemo")
    assert not (tmp_path / "merged.nemo").exists()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"layers": [1, 3]}, "early_exit.layers"),
        ({"head": {**EXITS["head"], "mlp": False}}, "early_exit.head"),
    ],
)
def test_other_exits_are_refused(base, exits, workers, change, word):
    message, unchanged = workers(1).run(load_refused, str(base), str(exits), {**EXITS, **change})[0]
    assert word in message and unchanged


@pytest.mark.parametrize("tp", [1, 2])
def test_a_truncated_model_takes_the_first_layers(base, workers, tp):
    """At TP 2 the padded vocabulary is larger than the checkpoint's too."""
    for gaps in workers(tp).run(truncated_gaps, str(base)):
        assert gaps and not any(gaps.values()), gaps


def test_full_checkpoints_and_adapters_are_not_confused(base, exits, workers):
    with pytest.raises(CheckpointError, match="full checkpoint"):
        adapter.read_adapter_config(base)
    from nemo_ee.checkpoint.model_config import refuse_adapter

    with pytest.raises(CheckpointError, match="exits only"):
        refuse_adapter(exits, archive.read_config(exits))


def edited(path: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """The same file with other tensors."""
    root = archive.extract(path, folder / "content")
    checkpoint = TorchDistCheckpoint(root / archive.WEIGHTS_DIRECTORY)
    tensors = {key: checkpoint.read(key) for key in checkpoint.tensors}
    change(tensors)
    shutil.rmtree(root / archive.WEIGHTS_DIRECTORY)
    write_torch_dist(root / archive.WEIGHTS_DIRECTORY, tensors)
    return archive.write_archive(root, folder / path.name)


def _set(key: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors[key].view(-1)[3:4].fill_(value)


LINEAR, UNTIED = "model.exits.2.linear.weight", "model.exits.2.projection.weight"
SPOILT = {
    "no tensors": (lambda t: [t.pop(key) for key in list(t)[1:]], "lacks"),
    "a layer is missing": (lambda t: [t.pop(key) for key in list(t) if ".exits.3." in key], "lacks"),
    "a tensor is missing": (lambda t: t.pop(LINEAR), f"lacks 1 tensors, first {LINEAR}"),
    "an exit that is not named": (
        lambda t: t.update({"model.exits.4.norm.weight": torch.ones(2)}),
        "has beyond",
    ),
    "another shape": (
        lambda t: t.update({LINEAR: t[LINEAR][:-1].clone()}),
        f"in other shapes 1 tensors, first {LINEAR}",
    ),
    "too few rows": (
        lambda t: t.update({UNTIED: t[UNTIED][:50].clone()}),
        f"in other shapes 1 tensors, first {UNTIED}",
    ),
    "NaN": (_set(LINEAR, float("nan")), f"hold NaN or infinities, first {LINEAR}"),
    "an infinity": (_set(UNTIED, -float("inf")), f"hold NaN or infinities, first {UNTIED}"),
}


def test_spoilt_exits_are_not_merged(base, exits, tmp_path):
    for number, (change, words) in enumerate(SPOILT.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        spoilt = edited(exits, folder, change)
        with pytest.raises(CheckpointError) as error:
            adapter.merge(base, spoilt, tmp_path / "merged.nemo")
        assert words in str(error.value) and str(spoilt) in str(error.value)
        assert [path.name for path in tmp_path.iterdir() if "merged" in path.name] == []


def test_weights_that_are_no_numbers_are_refused_by_name(base, exits, workers, tmp_path):
    """In exits, in a base, whole or truncated; by merging, too."""
    key = "model.decoder.layers.mlp.linear_fc2.weight"
    for name in ("base", "exits"):
        (tmp_path / name).mkdir()
    poor_base = edited(base, tmp_path / "base", _set(key, float("nan")))
    poor_exits = edited(exits, tmp_path / "exits", _set(LINEAR, float("inf")))
    with pytest.raises(CheckpointError, match=r"base\.nemo: .*linear_fc2\.weight holds NaN"):
        adapter.merge(poor_base, exits, tmp_path / "merged.nemo")
    found = workers(2).run(restore_refused, str(base), str(poor_base), str(poor_exits))
    for of_exits, of_base, of_truncated in found:
        assert f"{poor_exits}: 1 tensors hold NaN or infinities, first {LINEAR}" in of_exits
        assert f"{poor_base}: 1 tensors hold NaN or infinities, first {key} (decoder.layers.0.mlp" in of_base
        assert f"first {key} (decoder.layers.0.mlp" in of_truncated


def restore_refused(base: str, poor_base: str, poor_exits: str) -> tuple[str, str, str]:
    errors = []
    for work in (
        lambda: load_and_save_exits(base, poor_exits, "unused.nemo", 2, 1),
        lambda: restore_with_fresh_exits(poor_base, tp=2),
        lambda: truncated_gaps(poor_base),
    ):
        with pytest.raises(CheckpointError) as error:
            work()
        errors.append(str(error.value))
    return tuple(errors)


def check_all_heads(folder: str) -> list[str]:
    """Writes a base with exits of every kind; which kinds `check_exits` knows the tensors of."""
    from nemo_ee.checkpoint.exits.exit_tensors import check_exits
    from nemo_ee.checkpoint.keys import is_exit
    from nemo_ee.checkpoint.load import save_weights
    from tests.support.tiny_gpt import GPT3, HEADS, tiny_model, tiny_model_config

    checked = []
    for kind, backbone in {"Llama": {}, "GPT-3": GPT3}.items():
        for name, head in HEADS.items():
            model = tiny_model(tiny_model_config([2, 5], head, **backbone))
            parts = []
            for part, want in (("base", lambda key: not is_exit(key)), ("exits", is_exit)):
                save_weights(model, f"{folder}/{kind} {name} {part}", want)
                parts.append(TorchDistCheckpoint(f"{folder}/{kind} {name} {part}"))
            config = OmegaConf.create(OmegaConf.to_container(model.cfg))
            config.early_exit = model.early_exit.to_dict()
            config.base = {"vocab_size": model.true_vocab_size}
            check_exits("exits", config, parts[1], parts[0])
            checked.append(f"{kind} {name}")
            config.early_exit.layers = [2, 6]
            with pytest.raises(CheckpointError, match="lacks"):
                check_exits("exits", config, parts[1], parts[0])
    return checked


def test_exits_of_every_kind_are_known_by_their_tensors(workers, tmp_path):
    (checked,) = workers(1).run(check_all_heads, str(tmp_path))
    assert len(checked) == 10
