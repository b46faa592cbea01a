# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Thresholds go into a copy of the checkpoint, in one step, and nothing else changes."""

import os

import pytest
from omegaconf import OmegaConf

from nemo_ee.calibration.store import ThresholdStore, check_folder
from nemo_ee.checkpoint import archive
from nemo_ee.errors import CheckpointError, ConfigError

CONFIG = """\
num_layers: 8
base: {name: base.nemo, content_hash: abc, vocab_size: 100}
early_exit:
  layers: [2, 4, 6]
  inference: {threshold: 0.8, exits: null}
"""
WEIGHTS = os.urandom(3000)


def content(directory, config=CONFIG):
    (directory / "model_weights").mkdir(parents=True)
    (directory / "model_config.yaml").write_text(config)
    (directory / "model_weights" / "data").write_bytes(WEIGHTS)
    return directory


@pytest.fixture
def source(tmp_path):
    return archive.write_archive(content(tmp_path / "content"), tmp_path / "exits.nemo")


def store(source, output, overwrite=False, **others):
    return ThresholdStore(
        str(source), str(output), {key: str(path) for key, path in others.items()}, overwrite
    )


def files(path, directory):
    root = archive.extract(path, directory)
    found = {
        each.relative_to(root).as_posix(): each.read_bytes() for each in root.rglob("*") if each.is_file()
    }
    return OmegaConf.create(found.pop("model_config.yaml").decode()), found


def test_only_the_thresholds_differ(source, tmp_path):
    before = source.read_bytes()
    written = store(source, tmp_path / "deep" / "out.nemo").write((0.9, 0.75, 1.0), None)
    assert source.read_bytes() == before
    config, others = files(written, tmp_path / "seen")
    expected = OmegaConf.create(CONFIG)
    expected.early_exit.inference.threshold = [0.9, 0.75, 1.0]
    assert config == expected and others == {"model_weights/data": WEIGHTS}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out.nemo"]


def test_exits_in_use_are_stored_if_they_were_given(source, tmp_path):
    written = store(source, tmp_path / "out.nemo").write((0.9, 0.75), (2, 6))
    assert archive.read_config(written).early_exit.inference == {"threshold": [0.9, 0.75], "exits": [2, 6]}


@pytest.mark.parametrize(
    "config", ["early_exit: {layers: [2]}\n", "model:\n  early_exit:\n    layers: [2]\n"]
)
def test_forms_of_configurations(config, tmp_path):
    source = archive.write_archive(content(tmp_path / "content", config), tmp_path / "in.nemo")
    written = store(source, tmp_path / "out.nemo").write((0.5,), None)
    assert archive.read_config(written).early_exit == {"layers": [2], "inference": {"threshold": [0.5]}}


def test_an_extracted_checkpoint_stays_as_it_is(tmp_path):
    directory = content(tmp_path / "extracted")
    written = store(directory, tmp_path / "out.nemo").write((0.5, 0.5, 0.5), None)
    assert (directory / "model_config.yaml").read_text() == CONFIG
    assert archive.read_config(written).early_exit.inference.threshold == [0.5, 0.5, 0.5]


def test_the_source_is_replaced_only_if_it_is_named(source, tmp_path):
    written = store(source, tmp_path / "." / "exits.nemo").write((0.5, 0.6, 0.7), None)
    assert archive.read_config(source).early_exit.inference.threshold == [0.5, 0.6, 0.7]
    config, others = files(written, tmp_path / "seen")
    assert others == {"model_weights/data": WEIGHTS} and config.base.content_hash == "abc"


def test_what_may_not_be_written(source, tmp_path):
    other = tmp_path / "other.nemo"
    other.write_bytes(b"precious")
    with pytest.raises(ConfigError, match="other.nemo: exists; choose another, or set overwrite=true"):
        store(source, other)
    with pytest.raises(ConfigError, match="is gpt_model_file, which would be lost"):
        store(source, other, overwrite=True, gpt_model_file=other)
    with pytest.raises(ConfigError, match="is a directory"):
        store(source, tmp_path, overwrite=True)
    with pytest.raises(ConfigError, match="other.nemo is no directory that can be written to"):
        store(source, other / "out.nemo")
    with pytest.raises(ConfigError, match="report_dir=.*other.nemo is no directory that can be written to"):
        check_folder("report_dir", str(other / "deep" / "report"))
    check_folder("report_dir", str(tmp_path / "deep" / "report"))
    assert other.read_bytes() == b"precious" and not (tmp_path / "deep").exists()
    store(source, other, overwrite=True).write((0.5, 0.5, 0.5), None)
    assert archive.read_config(other).num_layers == 8


@pytest.mark.parametrize("moment", ["tarfile.TarFile.add", "os.replace", "omegaconf.OmegaConf.save"])
@pytest.mark.parametrize("name", ["out.nemo", "exits.nemo"])
def test_an_interruption_leaves_the_old_file(source, tmp_path, monkeypatch, moment, name):
    output = tmp_path / name
    if name == "out.nemo":
        output.write_bytes(b"old")
    before, there = output.read_bytes(), sorted(tmp_path.iterdir())

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    ready = store(source, output, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(moment, interrupt)
        with pytest.raises(KeyboardInterrupt):
            ready.write((0.5, 0.5, 0.5), None)
    assert output.read_bytes() == before and sorted(tmp_path.iterdir()) == there


def test_a_source_that_changed_meanwhile_is_refused(source, tmp_path):
    ready = store(source, tmp_path / "out.nemo")
    archive.write_archive(content(tmp_path / "other", CONFIG + "seed: 1\n"), source)
    os.utime(source, ns=(1, 1))
    with pytest.raises(CheckpointError, match="has changed since"):
        ready.write((0.5, 0.5, 0.5), None)
    assert not (tmp_path / "out.nemo").exists()
