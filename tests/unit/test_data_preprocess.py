# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Preprocessing compared with tokenizing each document directly."""

import json
import shutil

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from nemo_ee.checkpoint import archive
from nemo_ee.data.staged_datasets import StagedDatasets, staged_datasets
from nemo_ee.errors import CheckpointError, ConfigError, DataError, OutputError
from nemo_ee.preprocessing import encoding
from nemo_ee.preprocessing.preprocess import preprocess
from nemo_ee.preprocessing.preprocess_config import PreprocessConfig
from tests.support.tiny_tokenizer import save_tiny_tokenizer

TEXTS = [f"the cat {number} sat on mat {number * number}" for number in range(60)]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def config(source, tokenizer_dir, **overrides):
    values = {
        "input": str(source),
        "output_prefix": str(source.parent / "out" / "data"),
        "tokenizer": {"type": str(tokenizer_dir)},
        "split": {"train": 0.8, "validation": 0.2, "test": 0.0},
        "workers": 1,
    }
    return PreprocessConfig.from_dict({**values, **overrides})


def read(prefix):
    dataset = IndexedDataset(str(prefix))
    return [dataset[index].tolist() for index in range(len(dataset))]


def output_files(source):
    return sorted(path.name for path in (source.parent / "out").glob("*"))


def test_documents_are_tokenized_ended_and_split(source, tokenizer_dir):
    summary = preprocess(config(source, tokenizer_dir))
    out = source.parent / "out"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    train, validation = read(out / "data_train"), read(out / "data_validation")
    decoded = [tokenizer.decode(ids[:-1]) for ids in train + validation]
    assert sorted(decoded) == sorted(TEXTS)
    assert all(ids[-1] == tokenizer.eos_token_id for ids in train + validation)
    assert (len(train), len(validation)) == (48, 12)
    assert decoded[:48] == [text for text in TEXTS if text in set(decoded[:48])], "input order is kept"
    assert output_files(source) == [
        "data.json",
        "data_train.bin",
        "data_train.idx",
        "data_validation.bin",
        "data_validation.idx",
    ]
    assert json.loads((out / "data.json").read_text()) == summary
    assert summary["splits"]["train"] == {"documents": 48, "tokens": sum(map(len, train))}
    assert summary["tokens"] == sum(map(len, train + validation))
    assert summary["vocabulary_size"] == len(tokenizer)
    assert summary["dtype"] == "uint16"
    assert IndexedDataset(str(out / "data_train")).index.dtype is np.uint16


def test_output_does_not_depend_on_the_number_of_workers(source, tokenizer_dir, monkeypatch):
    out = source.parent / "out"
    preprocess(config(source, tokenizer_dir, output_prefix=str(out / "one")))
    monkeypatch.setattr(encoding, "CHARACTERS_PER_WORKER", 100)
    monkeypatch.setattr(encoding, "DOCUMENTS_PER_TASK", 3)
    monkeypatch.setattr(encoding, "CHARACTERS_PER_TASK", 50)
    monkeypatch.setattr(encoding, "TASKS_IN_FLIGHT", 4)
    preprocess(config(source, tokenizer_dir, output_prefix=str(out / "two"), workers=2))
    for name in ("_train.bin", "_train.idx", "_validation.bin", "_validation.idx"):
        assert (out / f"one{name}").read_bytes() == (out / f"two{name}").read_bytes()


def test_without_split_and_eod_one_dataset_has_the_plain_tokens(source, tokenizer_dir):
    summary = preprocess(config(source, tokenizer_dir, split=None, append_eod=False))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    expected = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    assert read(source.parent / "out" / "data") == expected
    assert summary["splits"] is None and summary["eod"] is None


def test_empty_and_repeated_documents_are_dropped_and_counted(source, tokenizer_dir):
    source.write_text("".join(json.dumps(text) + "\n" for text in ["a b", " ", "a b", "c d", ""]))
    summary = preprocess(config(source, tokenizer_dir, split=None))
    assert (summary["documents"], summary["repeated_documents"], summary["empty_documents"]) == (2, 1, 2)
    kept = preprocess(config(source, tokenizer_dir, split=None, deduplicate=False, overwrite=True))
    assert (kept["documents"], kept["repeated_documents"]) == (3, 0)


def test_existing_output_is_kept_unless_overwrite(source, tokenizer_dir):
    preprocess(config(source, tokenizer_dir))
    before = {path: path.read_bytes() for path in (source.parent / "out").iterdir()}
    cache = source.parent / "out" / "data_train" / "cache" / "GPTDataset_indices" / "0-document_index.npy"
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"stale")
    source.write_text(json.dumps("one new text") + "\n" + json.dumps("another") + "\n")
    with pytest.raises(DataError, match="overwrite=true"):
        preprocess(config(source, tokenizer_dir))
    assert all(path.read_bytes() == content for path, content in before.items()) and cache.exists()
    assert preprocess(config(source, tokenizer_dir, overwrite=True))["documents"] == 2
    assert not cache.exists(), "Megatron would take the sample index of the old data"


def test_failure_while_tokenizing_leaves_nothing_new(source, tokenizer_dir, monkeypatch):
    preprocess(config(source, tokenizer_dir))
    before = {path.name: path.read_bytes() for path in (source.parent / "out").iterdir()}

    def interrupted(self, name, token_ids):
        raise KeyboardInterrupt

    monkeypatch.setattr(StagedDatasets, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        preprocess(config(source, tokenizer_dir, overwrite=True))
    assert {path.name: path.read_bytes() for path in (source.parent / "out").iterdir()} == before


def test_nothing_is_left_where_publishing_fails(tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", refuse)
    with (
        pytest.raises(OutputError, match="t.bin: cannot be written: disk full"),
        staged_datasets({"train": tmp_path / "t"}, tmp_path / "t.json", 100) as datasets,
    ):
        datasets.add("train", [1, 2])
        datasets.finish({})
    assert list(tmp_path.iterdir()) == []


def test_bad_record_is_found_before_anything_is_written(source, tokenizer_dir):
    source.write_text(source.read_text() + '{"body": "x"}\n')
    with pytest.raises(DataError, match="record 61 has no key 'text'"):
        preprocess(config(source, tokenizer_dir))
    assert not (source.parent / "out").exists()


def test_all_empty_documents_are_refused(source, tokenizer_dir):
    source.write_text('""\n" "\n')
    with pytest.raises(DataError, match="all of its 2 documents are empty"):
        preprocess(config(source, tokenizer_dir))


def test_tokenizer_without_eos_is_refused_unless_eod_is_off(source, tmp_path):
    directory = save_tiny_tokenizer(tmp_path / "no_eos", eos=False)
    with pytest.raises(ConfigError, match="append_eod=true: .*no end-of-sequence token"):
        preprocess(config(source, directory))


def test_tokenizer_comes_out_of_a_nemo_file(source, tokenizer_dir, tmp_path):
    content = tmp_path / "content"
    shutil.copytree(tokenizer_dir, content / "tokenizer")
    (content / "model_config.yaml").write_text("tokenizer: {library: huggingface, type: 'nemo:tokenizer'}\n")
    nemo = archive.write_archive(content, tmp_path / "model.nemo")
    out = source.parent / "out"
    preprocess(config(source, tokenizer_dir, split=None))
    from_nemo = {"output_prefix": str(out / "nemo"), "tokenizer": {"nemo": str(nemo)}}
    summary = preprocess(config(source, tokenizer_dir, split=None, **from_nemo))
    assert (out / "nemo.bin").read_bytes() == (out / "data.bin").read_bytes()
    assert (summary["tokenizer"], summary["tokenizer_library"]) == (str(nemo), "nemo")
    shutil.rmtree(content / "tokenizer")
    broken = archive.write_archive(content, tmp_path / "broken.nemo")
    with pytest.raises(CheckpointError, match="there is no tokenizer/ in the checkpoint"):
        preprocess(config(source, tokenizer_dir, overwrite=True, tokenizer={"nemo": str(broken)}))


def test_missing_tokenizer_is_named(source, tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer.type=.*nowhere.*must be a Hugging Face tokenizer"):
        preprocess(config(source, tmp_path / "nowhere"))


def test_all_config_faults_are_listed_together():
    with pytest.raises(ConfigError) as error:
        PreprocessConfig.from_dict(
            {
                "input": "???",
                "document": "page",
                "worker": 2,
                "seed": -1,
                "split": {"train": 0.9, "valid": 0.1},
                "tokenizer": {"library": "huggingface", "tipe": "x"},
            }
        )
    message = str(error.value)
    assert {fault.key for fault in error.value.faults} == {
        "input",
        "output_prefix",
        "document",
        "worker",
        "seed",
        "split.valid",
        "tokenizer.tipe",
        "tokenizer.type",
    }
    assert "did you mean workers?" in message
    assert "did you mean split.validation?" in message
    assert "tokenizer.tipe=x: unknown key; did you mean type?" in message
