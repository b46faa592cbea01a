# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Whoever opens a checkpoint of somebody else's, in whichever way, meets the same refusals, and nothing of it runs."""

import json
import os
import pickle
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from nemo_ee.checkpoint import model_config
from nemo_ee.errors import CheckpointError
from tests.functional.test_sentencepiece_checkpoints import HEAD, config
from tests.support import hostile_nemo, tiny_chats, tiny_llama

CALL = {"_target_": "nemo.utils.exp_manager.os.system", "_args_": [f"touch {hostile_nemo.Touch.NAME}"]}
TABULAR = dict(library="tabular", type="x", vocab_file="nemo:coder.pickle", delimiter=",")
CHANGES = {
    "a _target_": (dict(_target_="nemo.utils.exp_manager.os.getcwd", x=CALL), "_target_"),
    "a cls of the scheduler": (
        dict(optim=dict(name="adamw", lr=1e-3, sched=dict(args=dict(cls="os.system")))),
        "cls",
    ),
    "a tabular tokenizer": (dict(tokenizer=TABULAR), "tokenizer.library"),
    "a resolver": (dict(seed="${oc.env:HOME}"), "oc.env:HOME"),
    "no tokenizer": (dict(tokenizer=None), "tokenizer=None"),
    "no activation": (dict(activation="os.system"), "activation='os.system'"),
    "a size of 0": (dict(hidden_size=0), "hidden_size=0"),
}
"""What is refused when the configuration is read -> changes of it, words of the error."""
TOO_LARGE = {
    "layers": (dict(num_layers=10_000), "num_layers=10000: the weights have 2 layers"),
    "width": (dict(ffn_hidden_size=2**24), "the weights have MLPs of width 64"),
    "vocabulary": (dict(make_vocab_size_divisible_by=2**24), "rows of the vocabulary"),
}
"""What is refused when the weights are there, before a model is built."""


def with_changes(source: str, path: str, changes: dict[str, Any]) -> str:
    """Copies a `.nemo` with other keys in its configuration, and a pickle beside it."""
    from nemo_ee.checkpoint import archive

    folder = archive.extract(source, f"{path}.content")
    settings = yaml.safe_load((folder / "model_config.yaml").read_text())
    (folder / "model_config.yaml").write_text(yaml.safe_dump({**settings, **changes}))
    (folder / "coder.pickle").write_bytes(pickle.dumps(hostile_nemo.Touch()))
    archive.write_archive(folder, path)
    shutil.rmtree(folder)
    return path


def ways_in(base: str, exits: str) -> dict[str, tuple[Callable[[str], Any], str]]:
    """How files are opened: name -> what does so with a path, and the honest file that it is like."""
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from omegaconf import OmegaConf

    from nemo_ee.calibration.store import ThresholdStore
    from nemo_ee.checkpoint import tokenizer
    from nemo_ee.checkpoint.connector import EarlyExitSaveRestoreConnector
    from nemo_ee.checkpoint.exits import adapter
    from nemo_ee.checkpoint.tokenizer import tokenizer_files
    from nemo_ee.data.tokenizer import TokenizerConfig
    from nemo_ee.models.exit_editor import edit_exits
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel as Model
    from nemo_ee.models.megatron_gpt_ee_tuning_model import MegatronGPTEETuningModel
    from nemo_ee.running.restore import restore_model
    from tests.support.tiny_nemo import tiny_trainer

    run = OmegaConf.create({"model": {"early_exit": {"layers": [1]}}, "trainer": {"precision": 32}})

    def files(path: str) -> None:
        with tokenizer_files(TokenizerConfig(nemo=path)):
            pass

    def stock(path: str) -> None:
        connector = EarlyExitSaveRestoreConnector()
        MegatronGPTModel.restore_from(path, trainer=tiny_trainer(), save_restore_connector=connector)

    return {
        "restore": (lambda path: Model.restore_from(path, trainer=tiny_trainer()), base),
        "restore NeMo's class": (stock, base),
        "restore for scripts": (lambda path: restore_model(path, None, tiny_trainer(), {}), base),
        "restore with exits": (lambda path: Model.restore_with_exits(path, exits, tiny_trainer()), base),
        "restore with their exits": (
            lambda path: Model.restore_with_exits(base, path, tiny_trainer()),
            exits,
        ),
        "tune": (lambda path: MegatronGPTEETuningModel.merge_cfg_with(path, run), base),
        "edit": (lambda path: edit_exits(path, "out.nemo", [], {}, tiny_trainer()), base),
        "merge": (lambda path: adapter.merge(path, exits, "out.nemo"), base),
        "merge their exits": (lambda path: adapter.merge(base, path, "out.nemo"), exits),
        "calibrate": (lambda path: ThresholdStore(path, "out.nemo", {}, False).write([0.5], None), base),
        "preprocess": (files, base),
        "read the tokenizer": (tokenizer.tokenizer_from_nemo, base),
        "unpacked": (lambda path: Model.restore_from(_unpacked(path), trainer=tiny_trainer()), base),
    }


def _unpacked(path: str) -> str:
    with tarfile.open(path) as tar:
        tar.extractall("unpacked", filter="data")
    return "unpacked"


BUILDING = (
    "restore",
    "restore NeMo's class",
    "restore for scripts",
    "restore with exits",
    "edit",
    "merge",
    "unpacked",
)
"""Ways that lead to a model."""
COMPARING = ("restore with exits", "merge")
"""Those that find two files with other numbers of layers first."""


def refusals(folder: str) -> dict[str, tuple[str, str, list[str]]]:
    """Way and change -> kind of the error, its text, and what lies in the folder afterwards."""
    from omegaconf import OmegaConf

    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel as Model
    from tests.support.tiny_nemo import LocalSpecGPT, tiny_trainer

    os.chdir(folder)
    file = tiny_chats.train_sentencepiece(Path(folder), "bpe")
    honest = OmegaConf.create(config(str(file), None))
    model = LocalSpecGPT(honest, tiny_trainer())
    from nemo_ee.checkpoint.connector import EarlyExitSaveRestoreConnector

    EarlyExitSaveRestoreConnector().save_to(model, "base.nemo")
    plain = Model.restore_from("base.nemo", return_config=True)
    section = {"layers": [1], "init": "random", "head": HEAD}
    tuned = Model.restore_from(
        "base.nemo", override_config_path=Model.add_exits(plain, section), trainer=tiny_trainer()
    )
    tuned.save_adapters("exits.nemo")
    found = {}
    for way, (enter, like) in ways_in("base.nemo", "exits.nemo").items():
        changes = CHANGES | (TOO_LARGE if way in BUILDING else {})
        for name, (change, _) in changes.items():
            if name == "layers" and way in COMPARING:
                continue
            path = with_changes(like, "evil.nemo", change)
            try:
                enter(path)
                kind, text = "none", "it was taken"
            except Exception as error:
                kind, text = type(error).__name__, str(error)
            Path(path).unlink()
            shutil.rmtree("unpacked", ignore_errors=True)
            found[f"{way}: {name}"] = kind, text, sorted(os.listdir())
    hostile_nemo.evil_tokenizer(Path("evil_tok"))
    for name, tokenizer in {
        "trusted": dict(library="huggingface", type="evil_tok", trust_remote_code=True),
        "not even asked for": dict(library="huggingface", type="evil_tok"),
    }.items():
        path = with_changes("base.nemo", "evil.nemo", dict(tokenizer=tokenizer))
        try:
            Model.restore_from(path, trainer=tiny_trainer())
            kind, text = "none", "it was taken"
        except Exception as error:
            kind, text = type(error).__name__, str(error)
        found[f"a tokenizer with code, {name}"] = (
            kind,
            text,
            sorted({*os.listdir()} - {"evil_tok", "evil.nemo"}),
        )
    found |= broken_tokenizers()
    return found


def broken_tokenizers() -> dict[str, tuple[str, str, list[str]]]:
    """The same for a tokenizer's file that is none, inside a checkpoint that is fine otherwise."""
    from nemo_ee.checkpoint import archive
    from nemo_ee.checkpoint.exits import adapter
    from nemo_ee.checkpoint.tokenizer import tokenizer_files
    from nemo_ee.data.tokenizer import TokenizerConfig
    from nemo_ee.preprocessing.document_tokenizer import DocumentTokenizer

    def preprocess(path: str) -> None:
        with tokenizer_files(TokenizerConfig(nemo=path)) as description:
            DocumentTokenizer(description)

    folder, found = archive.extract("base.nemo", "unpacked"), {}
    (model,) = folder.glob("*.model")
    model.write_bytes(b"none")
    archive.write_archive(folder, "evil.nemo")
    shutil.rmtree(folder)
    for way, enter in {
        "merge": lambda path: adapter.merge(path, "exits.nemo", "out.nemo"),
        "preprocess": preprocess,
    }.items():
        try:
            enter("evil.nemo")
            kind, text = "none", "it was taken"
        except Exception as error:
            kind, text = type(error).__name__, str(error)
        found[f"a broken tokenizer, {way}"] = kind, text, sorted({*os.listdir()} - {"evil_tok", "evil.nemo"})
    return found


@pytest.fixture(scope="module")
def found(workers, tmp_path_factory):
    return workers(1).run(refusals, str(tmp_path_factory.mktemp("hostile")))[0]


def test_every_way_in_refuses(found):
    for case, (kind, text, files) in found.items():
        _, _, name = case.partition(": ")
        known = CHANGES | TOO_LARGE
        words = known[name][1] if name in known else "load"
        broken = case.startswith("a broken tokenizer")
        assert kind == ("CheckpointError" if name in known or broken else "ConfigError"), (case, kind, text)
        assert words in text, (case, text)
        if name in known or broken:
            assert Path(text.split(": ")[0].removeprefix("tokenizer.nemo=")).name in (
                "evil.nemo",
                "unpacked",
            ), (case, text)
        assert [file for file in files if not file.startswith(("base", "exits", "tokenizer", "sp"))] == [], (
            case
        )


def test_activations_are_those_that_nemo_knows():
    from nemo.collections.nlp.parts.utils_funcs import activation_to_func

    with pytest.raises(ValueError, match="Supported activations") as refused:
        activation_to_func("none")
    known = re.findall(r"'([a-z-]+)'", str(refused.value))
    assert known and sorted(model_config._ACTIVATIONS) == sorted(known)


class TestHuggingFaceFolders:
    def test_no_code_of_theirs_runs(self, tmp_path, monkeypatch):
        """Nor is anybody asked whether it may."""
        from nemo_ee.checkpoint.conversion.convert import convert_to_nemo

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody is asked"))
        source = tiny_llama.write(tmp_path / "hf")
        evil = hostile_nemo.evil_tokenizer(tmp_path / "evil")
        shutil.copy(evil / "evil.py", source)
        for name, changes in {
            "config.json": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}},
            "tokenizer_config.json": {
                "tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
            },
        }.items():  # fmt: skip
            honest = (source / name).read_text()
            (source / name).write_text(json.dumps({**json.loads(honest), **changes}))
            with pytest.raises(CheckpointError):
                convert_to_nemo(source, tmp_path / "m.nemo")
            (source / name).write_text(honest)
        assert sorted(os.listdir()) == ["evil", "hf"]

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            (dict(num_hidden_layers=10_000), "at least"),
            (dict(num_hidden_layers=10**9), "num_hidden_layers=1000000000: must be a whole number"),
            (dict(hidden_size=0), "hidden_size=0"),
            (dict(num_key_value_heads=0), "num_key_value_heads=0"),
            (dict(num_attention_heads="4"), "num_attention_heads=4"),
            (dict(vocab_size=None), "vocab_size=None"),
            (dict(rms_norm_eps="small"), "rms_norm_eps=small"),
            (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "low_freq_factor"),
            (dict(rope_scaling=dict(rope_type="linear", factor="4")), "rope_scaling.factor=4"),
            (dict(rope_scaling=3), "config.json"),
            (dict(architectures="LlamaForCausalLM", auto_map=3), ""),
        ],
    )
    def test_sizes_that_are_none(self, tmp_path, changes, words):
        from nemo_ee.checkpoint.conversion.convert import convert_to_nemo

        source = tiny_llama.write(tmp_path / "hf")
        text = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**text, **changes}))
        with pytest.raises(CheckpointError) as error:
            convert_to_nemo(source, tmp_path / "m.nemo")
        assert words in str(error.value)
        assert os.listdir(tmp_path) == ["hf"]

    def test_files_too_large_for_a_tokenizer(self, tmp_path):
        from nemo_ee.checkpoint.conversion.convert import convert_to_nemo

        source = tiny_llama.write(tmp_path / "hf")
        with open(source / "tokenizer_config.json", "r+b") as file:
            file.truncate(30 * 2**30)  # a hole
        with pytest.raises(CheckpointError, match="tokenizer_config.json: has"):
            convert_to_nemo(source, tmp_path / "m.nemo")

    def test_an_adapter_is_no_model(self, tmp_path):
        from nemo_ee.checkpoint.conversion.convert import convert_to_nemo

        source = tiny_llama.write(tmp_path / "hf")
        (source / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
        with pytest.raises(CheckpointError, match="adapter_config.json"):
            convert_to_nemo(source, tmp_path / "m.nemo")

    @pytest.mark.parametrize("name", ["../{}", "/etc/{}", 3, ""])
    def test_weights_elsewhere_are_not_read(self, tmp_path, name):
        """An index that names a file of another folder, where it lies and would load."""
        from nemo_ee.checkpoint.conversion.convert import convert_to_nemo

        source = tiny_llama.write(tmp_path / "hf")
        weights = source / "model.safetensors"
        keys = list(load_file(weights))
        shutil.move(weights, tmp_path / weights.name)
        name = name.format(weights.name) if isinstance(name, str) else name
        index = {"metadata": {}, "weight_map": dict.fromkeys(keys, name)}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="index.json: names .*, which is no file of its folder"):
            convert_to_nemo(source, tmp_path / "m.nemo")


def test_transformers_is_never_told_to_trust():
    """Every call of ours that could says no; preprocessing hands on what its user said."""
    import ast

    from tests.support.script import ROOT

    calls = []
    for path in sorted((ROOT / "nemo_ee").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name not in ("from_pretrained", "get_nmt_tokenizer"):
                continue
            said = {word.arg: ast.unparse(word.value) for word in node.keywords}
            calls.append((path.name, said.get("trust_remote_code")))
    assert calls and {
        said for file, said in calls if (file, said) != ("tokenizer.py", "config.trust_remote_code")
    } == {"False"}
