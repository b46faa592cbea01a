# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""NeMo's stock connector, and lm-eval's way of loading, read every checkpoint that this package writes."""

import os
import shutil
import subprocess
import sys
import tarfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from nemo_ee.errors import CheckpointError
from tests.support import stock_nemo, tiny_llama

ROOT = Path(__file__).parents[2]
PLAIN = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
OURS = "nemo_ee.models.megatron_gpt_early_exit_model.MegatronGPTEarlyExitModel"
IDS = [3, 19, 21]
"""The tiny tokenizer's of "the cat sat"."""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
CLOSE = 1e-4
"""fp32 sums over at most 64 terms of order 1; logits are of order 10."""


def write_all(folder: str) -> torch.Tensor:
    """A converted checkpoint, and what became of it; Hugging Face's logits."""
    from transformers import AutoModelForCausalLM

    from nemo_ee.checkpoint.conversion.convert import convert_to_nemo
    from nemo_ee.checkpoint.exits import adapter
    from nemo_ee.models.exit_editor import edit_exits
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel
    from tests.support.tiny_nemo import tiny_trainer

    source = tiny_llama.write(Path(folder, "hf"))
    (source / "generation_config.json").write_text('{"eos_token_id": [18, 2]}')
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(source)(tiny_llama.prompts()).logits
    paths = {
        name: f"{folder}/{name}.nemo"
        for name in ("converted", "edited", "exits", "merged", "saved", "trained")
    }
    convert_to_nemo(source, paths["converted"])
    shutil.rmtree(source)
    section = {"init": "copy", "head": {"norm": True, "projection": "tied"}}
    edit_exits(paths["converted"], paths["edited"], [2], {}, tiny_trainer(), section)
    MegatronGPTEarlyExitModel.restore_from(paths["converted"], trainer=tiny_trainer()).save_to(paths["saved"])
    config = MegatronGPTEarlyExitModel.restore_from(paths["converted"], return_config=True)
    model = MegatronGPTEarlyExitModel.restore_from(
        paths["converted"],
        override_config_path=MegatronGPTEarlyExitModel.add_exits(config, {"layers": [3], **section}),
        trainer=tiny_trainer(),
    )
    model.save_adapters(paths["exits"])
    adapter.merge(paths["converted"], paths["exits"], paths["merged"])
    # As of a training class, which a reader has no data for.
    model.cfg.target = "nemo_ee.models.megatron_gpt_ee_pretraining_model.MegatronGPTEEPretrainingModel"
    model.save_to(paths["trained"])
    with tarfile.open(paths["converted"]) as tar:
        tar.extractall(f"{folder}/unpacked", filter="data")
    return theirs


def gap(model, theirs: torch.Tensor) -> float:
    ours = stock_nemo.logits(model, tiny_llama.prompts())[..., : theirs.shape[-1]]
    return (ours - theirs).abs().max().item()


def load_all(folder: str, theirs: torch.Tensor) -> dict:
    """Class, ids, ids that end a text, and gap of each; the process has imported nothing that knows the tokenizer."""
    assert "nemo_ee.models.megatron_gpt_model" not in sys.modules
    assert "nemo_ee.checkpoint.connector" not in sys.modules
    stock_nemo.use_local_layers()
    found = {}
    for name in ("converted.nemo", "unpacked", "edited.nemo", "merged.nemo", "saved.nemo", "trained.nemo"):
        both = name in ("converted.nemo", "unpacked", "merged.nemo")
        for way in (stock_nemo.restore, stock_nemo.as_lm_eval)[: 1 + both]:
            model = way(f"{folder}/{name}")
            kind = f"{type(model).__module__}.{type(model).__name__}"
            ends = list(model.cfg.tokenizer.eos_token_ids)
            found[name, way.__name__] = (
                kind,
                model.tokenizer.text_to_ids("the cat sat"),
                ends,
                gap(model, theirs),
            )
    return found


def tune_with_nemo(folder: str, theirs: torch.Tensor) -> tuple:
    """NeMo's class for supervised fine-tuning takes a base as itself; NeMo saves it; NeMo and we read that."""
    assert "nemo_ee.models.megatron_gpt_model" not in sys.modules
    stock_nemo.use_local_layers()
    sys.modules["datasets"] = MagicMock(__spec__=ModuleSpec("datasets", None))  # which NeMo reads data with
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import MegatronGPTSFTModel

    base = f"{folder}/converted.nemo"
    model = stock_nemo.restore(base, MegatronGPTSFTModel, data={})
    first = (
        type(model) is MegatronGPTSFTModel,
        model.tokenizer.text_to_ids("the cat sat"),
        gap(model, theirs),
    )
    os.makedirs(f"{folder}/tuned")
    model.save_to(f"{folder}/tuned/model.nemo")
    del model
    again = stock_nemo.restore(f"{folder}/tuned/model.nemo", MegatronGPTSFTModel, data={})
    second = (
        type(again) is MegatronGPTSFTModel,
        again.tokenizer.text_to_ids("the cat sat"),
        gap(again, theirs),
    )

    from nemo_ee.checkpoint.tokenizer import tokenizer_from_nemo
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel
    from tests.support.tiny_nemo import tiny_trainer

    ours = MegatronGPTEarlyExitModel.restore_from(f"{folder}/tuned/model.nemo", trainer=tiny_trainer())
    vocabulary = tokenizer_from_nemo(f"{folder}/tuned/model.nemo").get_vocab()
    return first, second, gap(ours, theirs), vocabulary == ours.tokenizer.tokenizer.get_vocab()


@pytest.fixture(scope="module")
def written(workers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    return folder, workers(1).run(write_all, str(folder))[0]


def test_stock_nemo_reads_all_that_is_written(workers, written):
    found = workers(1).run(load_all, str(written[0]), written[1])[0]
    for (name, way), (kind, ids, ends, difference) in found.items():
        plain = name in ("converted.nemo", "unpacked", "saved.nemo")
        assert (kind, ids, ends) == (PLAIN if plain else OURS, IDS, [2, 18]), (name, way)
        assert difference < CLOSE, (name, way)


def test_nemos_fine_tuning_takes_a_base_and_saves_it_with_its_tokenizer(workers, written):
    first, second, difference, same = workers(1).run(tune_with_nemo, str(written[0]), written[1])[0]
    for itself, ids, gap_to_theirs in (first, second):
        assert itself and ids == IDS and gap_to_theirs < CLOSE
    assert difference < CLOSE and same


def older_files(folder: str, theirs: torch.Tensor) -> list[tuple]:
    """Files with NeMo's class as target, or none, load through our connector, and NeMo reads what it saves of them."""
    from omegaconf import OmegaConf

    from nemo_ee.checkpoint import archive
    from nemo_ee.checkpoint.connector import EarlyExitSaveRestoreConnector
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel, MegatronGPTModel

    stock_nemo.use_local_layers()
    found = []
    for target in (PLAIN, None):
        shutil.copytree(f"{folder}/unpacked", f"older {target}")
        config = OmegaConf.load(f"older {target}/model_config.yaml")
        config.pop("target") if target is None else config.update(target=target)
        OmegaConf.save(config, f"older {target}/model_config.yaml")
        for cls in (MegatronGPTEarlyExitModel, MegatronGPTModel):
            model = cls.restore_from(
                f"older {target}",
                trainer=stock_nemo.trainer(),
                save_restore_connector=EarlyExitSaveRestoreConnector(),
            )
            EarlyExitSaveRestoreConnector().save_to(model, "again.nemo")
            again = stock_nemo.restore("again.nemo")
            saved = archive.read_config("again.nemo").target
            found.append(
                (type(model) is cls, gap(model, theirs), saved, type(again).__name__, gap(again, theirs))
            )
    return found


def test_older_files_load_through_our_connector(workers, written):
    for same, first, target, name, second in workers(1).run(older_files, str(written[0]), written[1])[0]:
        assert same and first < CLOSE and second < CLOSE
        assert target == "nemo_ee.models.megatron_gpt_model.MegatronGPTModel" and name == "MegatronGPTModel"


def without_its_tokenizer(folder: str) -> str:
    from nemo_ee.models.megatron_gpt_model import MegatronGPTModel

    shutil.copytree(f"{folder}/unpacked", "bare")
    shutil.rmtree("bare/tokenizer")
    with pytest.raises(CheckpointError) as error:
        stock_nemo.restore("bare", MegatronGPTModel)
    return str(error.value)


def test_a_tokenizer_that_is_missing_is_named(workers, written):
    message = workers(1).run(without_its_tokenizer, str(written[0]))[0]
    assert "tokenizer.type=nemo:tokenizer" in message and "there is no tokenizer/" in message


def load_without_this_package(folder: str, theirs: torch.Tensor) -> tuple:
    """The command that the configuration of the converter gives, pasted; then NeMo alone."""
    lines = (ROOT / "conf/convert_llama_hf_to_nemo.yaml").read_text().splitlines()
    (command,) = (line.lstrip("# ") for line in lines if "tar -xf" in line)
    shutil.copy(f"{folder}/converted.nemo", "smollm2.nemo")
    subprocess.run(command, shell=True, check=True)
    assert "nemo_ee.models" not in sys.modules
    sys.modules["nemo_ee.models"] = None  # an import of it fails from now on
    stock_nemo.use_local_layers()
    with pytest.raises(Exception, match="nemo:tokenizer"):
        stock_nemo.restore("smollm2.nemo")
    model = stock_nemo.restore(os.path.abspath("smollm2"))
    return model.tokenizer.text_to_ids("the cat sat"), gap(model, theirs)


def test_where_this_package_is_missing_the_documented_command_helps(workers, written):
    ids, difference = workers(1).run(load_without_this_package, str(written[0]), written[1])[0]
    assert ids == IDS and difference < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "name", "kind"), [("lm-eval", "unpacked", PLAIN), ("restore", "merged.nemo", OURS)]
)
def test_in_a_fresh_process(way, name, kind, written, tmp_path):
    folder, theirs = written
    torch.save(tiny_llama.prompts(), tmp_path / "ids.pt")
    command = [sys.executable, "-m", "tests.support.stock_nemo", way, str(folder / name)]
    subprocess.run([*command, "ids.pt", "found.pt"], cwd=tmp_path, env=ENVIRONMENT, check=True, timeout=400)
    found = torch.load(tmp_path / "found.pt")
    assert (found["class"], found["text"]) == (kind, IDS)
    assert (found["logits"][..., : theirs.shape[-1]] - theirs).abs().max() < CLOSE
