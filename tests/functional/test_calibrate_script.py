# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""scripts/calibrate_early_exit.py as a user runs it, and generation with what it wrote."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_ee.checkpoint import archive
from tests.support.script import ROOT, run_script

HEAD = dict(mlp=True, linear=True, projection="shortlist", shortlist_size=100)
LENGTH = 16


def write_inputs(directory):
    """A base, exits for it, the two merged, and text; in a process of their own."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from nemo_ee.checkpoint.exits.adapter import merge
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel as Model
    from tests.support.calibration_population import made_up_prices
    from tests.support.tiny_gpt import VOCABULARY, fill, tiny_model, tiny_model_config, tiny_trainer

    config = tiny_model_config(head=HEAD)
    early_exit = config.pop("early_exit")
    base = f"{directory}/base.nemo"
    tiny_model(config).save_to(base)
    plain = Model.restore_from(base, return_config=True, trainer=tiny_trainer())
    with_exits = Model.add_exits(plain, early_exit)
    model = Model.restore_from(base, override_config_path=with_exits, trainer=tiny_trainer())
    fill(model)
    model.save_adapters(f"{directory}/exits.nemo")
    merge(base, f"{directory}/exits.nemo", f"{directory}/merged.nemo")
    rng = np.random.default_rng(1)
    builder = IndexedDatasetBuilder(f"{directory}/text.bin", dtype=np.uint16)
    for length in rng.integers(LENGTH - 2, LENGTH + 9, 160):
        builder.add_document(rng.integers(6, VOCABULARY, length), [length])
    builder.finalize(f"{directory}/text.idx")
    prices = replace(made_up_prices((2, 4, 6), 8, head=0.1, output=1.0), output_kind="exact8")
    prices.write(Path(directory, "prices.json"))
    with Path(directory, "chats.jsonl").open("w") as file:
        for _ in range(40):
            asked, said = (" ".join(f"w{n}" for n in rng.integers(1, 60, count)) for count in (4, 20))
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            file.write(json.dumps({"messages": turns}) + "\n")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, workers):
    directory = tmp_path_factory.mktemp("calibrate")
    workers(1).run(write_inputs, str(directory))
    return directory


def run(directory, *arguments):
    given = ["data.prefix=text", f"data.seq_length={LENGTH}", "data.batch_size=32", "levels=10"]
    given += ["prices_file=prices.json", *arguments]
    return run_script(directory, "calibrate_early_exit.py", *given)


def generate(directory, thresholds):
    """What base and calibrated exits generate, by default and with thresholds spelled out, and at full depth."""
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel as Model
    from tests.support.tiny_gpt import tiny_trainer

    os.chdir(directory)
    model = Model.restore_with_exits("base.nemo", "calibrated.nemo", tiny_trainer()).eval()
    prompts, lengths = ["w1 w2 w3", "w50 w60"], {"max_length": 12, "min_length": 12}
    ways = ({"always": True}, {"threshold": thresholds, "always": True}, {"threshold": 0.999, "always": True})
    texts = [model.generate(prompts, lengths, early_exit=way) for way in ways]
    return model.early_exit.inference.threshold, [
        [each["exit_layers"] for each in text["early_exit"]] for text in texts
    ]


def calibrate_merged(directory, overrides):
    """The script's own steps in this rank, of the merged model; its report, and hashes of both files."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from nemo_ee.calibration.calibrate import calibrate
    from nemo_ee.calibration.settings import CalibrationConfig
    from nemo_ee.checkpoint.content_hash import backbone_content_hash
    from nemo_ee.models.runs.trainer_builder import EarlyExitTrainerBuilder

    os.chdir(directory)
    given = [
        "gpt_model_file=merged.nemo",
        "data.prefix=text",
        f"data.seq_length={LENGTH}",
        "data.batch_size=32",
        "prices_file=prices.json",
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        composed = compose("calibrate_early_exit", [*given, *overrides])
    values = OmegaConf.to_container(composed, resolve=True)
    trainer = values.pop("trainer")
    config = CalibrationConfig.from_dict({**values, "precision": trainer["precision"]})
    settings = OmegaConf.create({"trainer": trainer, "model": {"precision": trainer["precision"]}})
    report, written = calibrate(config, EarlyExitTrainerBuilder(settings).create_trainer())
    return report, backbone_content_hash("merged.nemo"), backbone_content_hash(written[0])


def members(path, directory):
    root = archive.extract(path, directory)
    return {file.relative_to(root): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_generation_uses_what_the_script_wrote(workspace, workers, tmp_path):
    before = (workspace / "exits.nemo").read_bytes()
    files = ["gpt_model_file=base.nemo", "adapter_file=exits.nemo", "output_file=calibrated.nemo"]
    done = run(workspace, *files, "target_agreement=0.5", "report_dir=report")
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((workspace / "report" / "calibration.json").read_text())
    thresholds = report["thresholds"]
    assert 0 < report["number"] <= report["kept"] and report["guaranteed"] and min(thresholds) < 1.0
    assert json.loads((workspace / "report" / "prices.json").read_text())["source"] == "made up"
    for words in (
        "With a probability of at least 95 %",
        "wrote calibrated.nemo",
        f"exit 4: threshold {thresholds[1]:g}",
        "an expected speed-up of",
    ):
        assert words in done.stdout
    assert report["metadata"]["command"].endswith("report_dir=report") and str(workspace) not in json.dumps(
        report
    )
    stored, (usual, spelled_out, strict) = workers(1).run(generate, str(workspace), thresholds)[0]
    assert list(stored) == thresholds
    assert usual == spelled_out != strict
    assert (workspace / "exits.nemo").read_bytes() == before
    old, new = (members(workspace / name, tmp_path / name) for name in ("exits.nemo", "calibrated.nemo"))
    assert old.keys() == new.keys()
    assert [str(name) for name in old if old[name] != new[name]] == ["model_config.yaml"]


def test_nothing_certified_has_a_status_of_its_own(workspace):
    """One level besides 1: an exit that is asked lets every token go, and exits of random weights are mostly wrong."""
    files = ["gpt_model_file=base.nemo", "adapter_file=exits.nemo", "output_file=never.nemo", "exits=[4,6]"]
    done = run(workspace, *files, "target_agreement=0.96", "levels=1", "report_dir=failed")
    assert done.returncode == 2, done.stderr[-2000:]
    assert "No thresholds" in done.stdout and "The stored thresholds are 1.0" in done.stdout
    assert "nothing chosen" in done.stderr
    inference = archive.read_config(workspace / "never.nemo").early_exit.inference
    assert inference.threshold == [1.0, 1.0] and inference.exits == [4, 6]
    assert json.loads((workspace / "failed" / "calibration.json").read_text())["number"] == 0


def test_merged_models_keep_their_backbone(workspace, workers):
    arguments = [
        "output_file=merged_calibrated.nemo",
        "target_agreement=0.5",
        "levels=10",
        "report_dir=merged",
    ]
    report, before, after = workers(1).run(calibrate_merged, str(workspace), arguments)[0]
    assert before == after and report.number > 0
    inference = archive.read_config(workspace / "merged_calibrated.nemo").early_exit.inference
    assert tuple(inference.threshold) == report.thresholds


@pytest.mark.parametrize("text", ["prompt_tokens=5", "chats_file=chats.jsonl"])
def test_point_estimates_on_other_text(workspace, workers, text):
    """What the model says at full depth, and answers of chats; all documents choose, and nothing is promised."""
    kind = text.partition("_")[0]
    arguments = [f"output_file={kind}.nemo", f"report_dir={kind}", f"data.{text}", "guarantee=false"]
    arguments += ["target_agreement=0.5"] + ["data.prefix=null"] * (kind == "chats")
    report, _, _ = workers(1).run(calibrate_merged, str(workspace), arguments)[0]
    assert not report.guaranteed and report.promise.startswith("Point estimate, no guarantee")
    documents = {"prompt": 158, "chats": 40}  # two beginnings are followed by the end of text at once
    assert report.test.documents == documents[kind] and report.tuning.documents == 0
    assert report.test.documents < report.test.tokens <= report.test.documents * LENGTH
    assert report.chosen.agreement >= 0.5 and report.chosen.speedup > 1.0
    assert (
        tuple(archive.read_config(workspace / f"{kind}.nemo").early_exit.inference.threshold)
        == report.thresholds
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prices_file": "exits.nemo"}, "prices_file=exits.nemo: is no"),
        ({"data": {"chats_file": "none.jsonl", "seq_length": LENGTH}}, "data.chats_file=none.jsonl: "),
        ({"data": {"prefix": "text", "prompt_tokens": 60, "seq_length": 8}}, "data.prompt_tokens=60: with"),
        ({"adapter_file": None}, "base.nemo: has no exits to calibrate; set adapter_file"),
        ({"exits": [3, 4]}, "exits=[3, 4]: not all of the model's exits [2, 4, 6]"),
        (
            {"data": {"prefix": "text", "seq_length": 65}},
            "data.seq_length=65: exceeds the model's encoder_seq",
        ),
        ({"data": {"prefix": "missing"}, "seq_length": 8}, "unknown key"),
        ({"data": {"prefix": "missing", "seq_length": 8}}, "data.prefix=missing: missing.bin does not exist"),
        (
            {"output_file": "merged.nemo"},
            "output_file=merged.nemo: exists; choose another, or set overwrite=true",
        ),
        ({"output_file": "base.nemo", "overwrite": True}, "is gpt_model_file, which would be lost"),
        ({"target_agreement": 0.99}, "120 test documents cannot certify target_agreement=0.99"),
        (
            {"data": {"prefix": "text", "seq_length": LENGTH, "documents": 40}},
            "the text has 160: raise data.docu",
        ),
    ],
)
def test_faults_are_found_before_the_model_is_built(workspace, monkeypatch, changes, words):
    from nemo_ee.calibration.calibrate import calibrate
    from nemo_ee.calibration.settings import CalibrationConfig
    from nemo_ee.errors import CheckpointError, ConfigError, DataError

    monkeypatch.chdir(workspace)
    values = {"gpt_model_file": "base.nemo", "adapter_file": "exits.nemo", "output_file": "refused.nemo"}
    values |= {"data": {"prefix": "text", "seq_length": LENGTH}, "report_dir": "refused", **changes}
    with pytest.raises((CheckpointError, ConfigError, DataError)) as error:
        calibrate(CalibrationConfig.from_dict(values), trainer=None)
    assert words in str(error.value)
    assert not (workspace / "refused").exists() and not (workspace / "refused.nemo").exists()


def test_exits_that_are_sure_by_another_rule_are_refused(workspace, tmp_path):
    from omegaconf import OmegaConf

    from nemo_ee.calibration.calibrate import calibrate
    from nemo_ee.calibration.settings import CalibrationConfig
    from nemo_ee.errors import ConfigError

    content = archive.extract(workspace / "exits.nemo", tmp_path / "content")
    config = archive.read_config(content)
    config.early_exit.inference.confidence = "entropy"
    OmegaConf.save(config, content / archive.CONFIG_NAME)
    values = {"gpt_model_file": str(workspace / "base.nemo"), "adapter_file": str(content)}
    values |= {"output_file": "refused.nemo", "data": {"prefix": "text", "seq_length": LENGTH}}
    with pytest.raises(
        ConfigError, match="inference.confidence=entropy: text is scored by max_probability alone"
    ):
        calibrate(CalibrationConfig.from_dict(values), trainer=None)
