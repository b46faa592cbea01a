# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Damaged, empty, short and foreign datasets are named before Megatron meets them."""

import pickle

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from omegaconf import OmegaConf

from nemo_ee.data.checks import check_data_config, check_indexed_dataset
from nemo_ee.data.data_config import dataset_parts
from nemo_ee.data.token_counts import token_counts
from nemo_ee.errors import ConfigError, DataError


def write_dataset(prefix, documents, dtype=np.uint16):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture
def dataset(tmp_path):
    """100 documents of 10 tokens; document d is ten times the token d % 7."""
    return write_dataset(tmp_path / "good", [[number % 7] * 10 for number in range(100)])


def test_good_dataset_passes_and_is_opened(dataset):
    file = check_indexed_dataset(dataset, sequence_length=999, vocab_size=7, name="train")
    assert file.tokens == 1000
    assert file.token_ids()[:11].tolist() == [0] * 10 + [1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "good.bin").unlink(), "good.bin does not exist"),
        (lambda p: (p / "good.idx").unlink(), "good.idx does not exist"),
        (lambda p: (p / "good.bin").write_bytes((p / "good.bin").read_bytes()[:-1]), "bin is truncated"),
        (
            lambda p: (p / "good.bin").write_bytes((p / "good.bin").read_bytes() + b"12"),
            "not the data of this index",
        ),
        (
            lambda p: (p / "good.idx").write_bytes((p / "good.idx").read_bytes()[:-8]),
            "idx is truncated or damaged",
        ),
        (lambda p: (p / "good.idx").write_bytes(b"MMIDIDX"), "less than its header"),
        (lambda p: (p / "good.idx").write_bytes(b"x" * 400), "is not the index of a Megatron dataset"),
    ],
)
def test_damage_is_described(dataset, tmp_path, damage, message):
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        check_indexed_dataset(dataset, 10, 7, "train")


def test_too_short_empty_and_foreign_tokens(dataset, tmp_path):
    with pytest.raises(
        DataError, match=r"train must have at least one sequence of 1000 tokens \(with targets 1001\)"
    ):
        check_indexed_dataset(dataset, 1000, 7, "train")
    with pytest.raises(DataError, match="^data.prefix=.* or a smaller data.seq_length$"):
        check_indexed_dataset(dataset, 1000, 7, "text", key="data.prefix", length_key="data.seq_length")
    with pytest.raises(DataError, match="must have token ids from 0 to 5, has 0 to 6"):
        check_indexed_dataset(dataset, 10, 6, "train")
    with pytest.raises(DataError, match="has no tokens"):
        check_indexed_dataset(write_dataset(tmp_path / "empty", []), 10, 7, "validation")


@pytest.mark.parametrize(
    "data",
    [
        {"data_prefix": "P", "splits_string": "90,5,5"},
        {"data_prefix": ["P"], "splits_string": "90,10"},
        {"data_prefix": [0.3, "P", 0.7, "Q"], "splits_string": "90,10,0"},
        {"data_prefix": ["P", "Q"], "splits_string": "90,10,0"},
        {"data_prefix": {"train": ["P"], "validation": [1.0, "Q"], "test": None}},
        {"data_impl": "mock", "data_prefix": None},
    ],
)
def test_nemo_forms_pass(dataset, tmp_path, data):
    second = write_dataset(tmp_path / "second", [[1] * 30] * 20)
    text = OmegaConf.to_yaml(OmegaConf.create(data))
    cfg = OmegaConf.create(text.replace("P\n", f"{dataset}\n").replace("Q\n", f"{second}\n"))
    check_data_config(cfg, sequence_length=16, vocab_size=7)


def test_split_that_rounds_to_nothing_is_an_error(dataset):
    with pytest.raises(
        DataError, match=r"\(test\)=.*test must have at least one sequence of 16 tokens.*has no tokens"
    ):
        check_data_config({"data_prefix": [dataset], "splits_string": "900,99,1"}, 16, 7)


def test_every_dataset_at_fault_is_listed(dataset, tmp_path):
    data = {"data_prefix": {"train": [dataset], "validation": [str(tmp_path / "no")], "test": [dataset]}}
    with pytest.raises(DataError) as error:
        check_data_config(data, sequence_length=5000, vocab_size=7)
    assert [line.split("=")[0] for line in str(error.value).splitlines()] == [
        "model.data.data_prefix.train",
        "model.data.data_prefix.validation",
        "model.data.data_prefix.test",
    ]


@pytest.mark.parametrize(
    ("data_prefix", "splits", "message"),
    [
        (None, "90,10", "must name at least one dataset"),
        ([], "90,10", "must name at least one dataset"),
        ([0.5, "a", "b"], "90,10", "a weight before every prefix or before none"),
        ([0.5, "a", 0.0, "b"], "90,10", "weights must be above 0"),
        (["a", "a"], "90,10", "must name each dataset once"),
        (["a"], None, "model.data.splits_string=null"),
        (["a"], "0,0,0", "up to three shares"),
        (["a"], "0,50,50", "must leave data to train on"),
        ({"train": ["a"], "validation": ["b"]}, None, "data_prefix.test=null: must be there"),
        ({"train": None, "validation": ["b"], "test": None}, None, "must name data to train on"),
        (
            {"train": ["a"], "val": ["b"], "validation": None, "test": None},
            None,
            "data_prefix.val=.*is not a split",
        ),
        ({"train": "a", "validation": None, "test": None}, None, "must be a list"),
    ],
)
def test_malformed_data_sections(data_prefix, splits, message):
    with pytest.raises(ConfigError, match=message):
        dataset_parts(data_prefix, splits)


@pytest.mark.parametrize("splits", ["90,5,5", "1,1,1", "7", "0.97,0.03", "1,0,2"])
@pytest.mark.parametrize("total", [7, 99, 1000])
def test_parts_agree_with_megatron(splits, total):
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(splits))
    parts = dataset_parts("p", splits)
    for name, bounds in zip(("train", "validation", "test"), matrix, strict=True):
        assert (name in parts) == (bounds is not None)
        if bounds is not None:
            expected = tuple(int(round(bound * float(total))) for bound in bounds)
            assert parts[name][0].sequences(total) == expected


def test_token_counts_of_the_training_split_only(dataset):
    counts = token_counts([dataset], 9, splits_string="35,65,0")
    assert counts.tolist() == [50] * 7 + [0, 0]
    assert str(counts.dtype) == "torch.int64"
    whole = {"train": [dataset], "validation": None, "test": None}
    assert token_counts(whole, 7).tolist() == [150, 150] + [140] * 5
    assert token_counts(whole, 7, max_tokens=25).tolist() == [10, 10, 5, 0, 0, 0, 0]


def test_token_counts_follow_blend_weights(dataset, tmp_path):
    other = write_dataset(tmp_path / "other", [[8] * 10])
    blend = {"train": [1, dataset, 3, other], "validation": None, "test": None}
    counts = token_counts(blend, 9)
    assert int(counts[8]) == pytest.approx(0.75 * 1010, abs=1)
    assert int(counts[:7].sum()) == pytest.approx(0.25 * 1010, abs=4)


def test_token_counts_refuse_foreign_tokens(dataset):
    with pytest.raises(DataError, match="must have token ids from 0 to 3"):
        token_counts({"train": [dataset], "validation": None, "test": None}, 4)


def test_of_a_large_corpus_spread_blocks_are_read(dataset, tmp_path, monkeypatch):
    """At most so many tokens in all parts together, and from beginning to end."""
    from nemo_ee.data import checks
    from nemo_ee.data.index_file import IndexedFile, open_indexed_file

    file, read, whole = open_indexed_file(dataset), [], IndexedFile.spread_blocks

    def record(self, part, tokens, size=7):
        for block in whole(self, part, tokens, size):
            read.append(len(block))
            yield block

    blocks = [block.tolist() for block in file.spread_blocks(slice(10, 990), 35, 7)]
    assert len(blocks) == 5 and all(len(block) == 7 for block in blocks)
    assert blocks[0] == file.token_ids()[10:17].tolist() and blocks[-1] == file.token_ids()[983:990].tolist()
    assert sum(map(len, file.spread_blocks(slice(10, 990), 980, 7))) == 980
    monkeypatch.setattr(IndexedFile, "spread_blocks", record)
    monkeypatch.setattr(checks, "MAX_SCANNED_TOKENS", 90)
    other = write_dataset(tmp_path / "other", [[3] * 10] * 50 + [[8] * 10])
    blend = {"train": [0.5, dataset, 0.5, other], "validation": [dataset], "test": None}
    with pytest.raises(DataError, match="train must have token ids from 0 to 6, has 3 to 8"):
        check_data_config({"data_prefix": blend}, 5, 7)
    assert 60 < sum(read) <= 90
    assert token_counts({**blend, "train": [other]}, 9, max_tokens=80)[8] > 0, "the end is read, too"


class _Program:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("kind", ["pickle", "objects", "fractions", "zip", "empty"])
@pytest.mark.parametrize("beside", [True, False])
def test_what_megatron_would_unpickle_beside_a_dataset_is_refused(dataset, tmp_path, kind, beside):
    folder = tmp_path / ("good/cache/GPTDataset_indices" if beside else "elsewhere")
    folder.mkdir(parents=True)
    data = dict(
        data_prefix={"train": [dataset], "validation": None, "test": None},
        index_mapping_dir=None if beside else str(folder),
    )
    np.save(folder / "0-GPTDataset-train-sample_index.npy", np.zeros((3, 2), np.int32))
    check_data_config(data, 10, 7)
    file, marker = folder / "0-GPTDataset-train-document_index.npy", tmp_path / "ran"
    if kind == "pickle":
        file.write_bytes(pickle.dumps(_Program(marker)))
    elif kind == "objects":
        np.save(file, np.array([_Program(marker)], dtype=object), allow_pickle=True)
    elif kind == "fractions":
        np.save(file, np.zeros(3))
    elif kind == "zip":
        with open(file, "wb") as stream:
            np.savez(stream, a=np.zeros(3))
    else:
        file.write_bytes(b"")
    with pytest.raises(
        DataError, match=r"document_index.npy is no array of whole numbers.*; delete that file"
    ):
        check_data_config(data, 10, 7)
    assert not marker.exists()
