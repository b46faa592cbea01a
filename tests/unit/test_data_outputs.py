# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Datasets and tokenizers where the disk is full, where a process was killed, and where two write at once."""

import json
import os
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from nemo_ee.errors import DataError, OutputError
from nemo_ee.preprocessing import encoding
from nemo_ee.preprocessing.preprocess import preprocess
from nemo_ee.preprocessing.preprocess_config import PreprocessConfig
from nemo_ee.preprocessing.tokenizer_training import TokenizerTrainingConfig, train_tokenizer
from tests.support.full_disk import file_limit
from tests.support.other_process import other_process
from tests.support.tiny_tokenizer import save_tiny_tokenizer

TEXTS = [f"the cat {number} sat on mat {number * number}" for number in range(200)]
HOLD = """
    import sys
    from contextlib import ExitStack
    from nemo_ee.files.output import claim, replaced_files, replaced_folder
    with ExitStack() as stack:
        if sys.argv[1] == "claim":
            stack.enter_context(claim(sys.argv[2]))
        elif sys.argv[1] == "files":
            for part in stack.enter_context(replaced_files(sys.argv[2:])):
                part.write_text("half of it")
        else:
            (stack.enter_context(replaced_folder(sys.argv[2])) / "tokenizer.json").write_text("half of it")
        print("holds", flush=True)
        sys.stdin.read()
    """


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in TEXTS))
    return path


def run(source, tokenizer_dir, **overrides) -> dict:
    values = {
        "input": str(source),
        "output_prefix": str(source.parent / "out" / "data"),
        "tokenizer": {"type": str(tokenizer_dir)},
        "split": {"train": 0.8, "validation": 0.2},
        "workers": 1,
    }
    return preprocess(PreprocessConfig.from_dict({**values, **overrides}))


def train(source, **overrides) -> None:
    values = {
        "input": str(source),
        "output": str(source.parent / "tok"),
        "vocabulary_size": 300,
        "split": None,
    }
    train_tokenizer(TokenizerTrainingConfig.from_dict({**values, **overrides}))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk_leaves_the_old_dataset_and_nothing_else(source, tokenizer_dir):
    with (
        file_limit(2000),
        pytest.raises(OutputError, match=r"data_\w+.(bin|idx): cannot be written: .*; raise"),
    ):
        run(source, tokenizer_dir)
    assert not (source.parent / "out").exists()
    run(source, tokenizer_dir)
    before = content(source.parent)
    with file_limit(2000), pytest.raises(OutputError, match="cannot be written"):
        run(source, tokenizer_dir, overwrite=True)
    assert content(source.parent) == before


def test_of_two_runs_at_one_output_one_refuses(source, tokenizer_dir):
    out = source.parent / "out"
    for held in ("data_train.bin", "data_validation.idx", "data.json"):
        with other_process(HOLD, "claim", out / held) as other:
            assert other.line() == "holds"
            with pytest.raises(
                OutputError, match=rf"{held}: process \d+ on .* is writing it; wait for its end"
            ):
                run(source, tokenizer_dir)
    run(source, tokenizer_dir)
    assert len(content(out)) == 5


def test_what_a_killed_run_left_is_removed_by_the_next(source, tokenizer_dir):
    out = source.parent / "out"
    paths = [out / f"data_{name}" for name in ("train.bin", "train.idx")]
    with other_process(HOLD, "files", *paths, out / "of another run.bin") as other:
        assert other.line() == "holds"
        other.kill()
    assert len(content(out)) == 6
    run(source, tokenizer_dir)
    names = {f"data_{name}.{end}" for name in ("train", "validation") for end in ("bin", "idx")}
    assert content(out).keys() == {*names, "data.json"}


def test_an_output_that_is_an_input_is_refused(source, tokenizer_dir):
    whole = source.with_name("articles.json")
    whole.write_text(json.dumps(TEXTS))
    before = whole.read_bytes()
    for prefix in (source.parent / "articles", source.parent / "." / "articles"):
        with pytest.raises(DataError, match=r"articles.json is an input, and would be lost; choose another"):
            run(whole, tokenizer_dir, output_prefix=str(prefix), overwrite=True)
    assert whole.read_bytes() == before


def test_names_of_inputs_that_are_no_utf8_are_told(source, tokenizer_dir, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9.txt")
    (folder / name).write_text("the cat sat")
    run(folder, tokenizer_dir, split=None)
    (found,) = json.loads((tmp_path / "out" / "data.json").read_text())["inputs"]
    assert found["path"] == str(folder / name) and found["bytes"] == 11


def test_a_process_that_was_killed_while_it_tokenized_is_an_error(source, tokenizer_dir, monkeypatch):
    class Pool(encoding.ProcessPoolExecutor):
        def map(self, *args, **kwargs):
            raise BrokenProcessPool("killed")

    monkeypatch.setattr(encoding, "CHARACTERS_PER_WORKER", 100)
    monkeypatch.setattr(encoding, "ProcessPoolExecutor", Pool)
    with pytest.raises(DataError, match="was killed, most likely for want of memory; set workers=2"):
        run(source, tokenizer_dir, workers=4)
    assert not (source.parent / "out").exists()


def test_tasks_and_blocks_are_bounded_and_keep_the_order(monkeypatch):
    monkeypatch.setattr(encoding, "DOCUMENTS_PER_TASK", 3)
    monkeypatch.setattr(encoding, "CHARACTERS_PER_TASK", 10)
    monkeypatch.setattr(encoding, "TASKS_IN_FLIGHT", 2)
    texts = ["a" * n for n in (1, 1, 1, 1, 12, 2, 9, 0, 0, 0, 5, 4)]
    blocks = list(encoding._blocks(iter(texts)))
    assert [text for block in blocks for task in block for text in task] == texts
    tasks = [task for block in blocks for task in block]
    assert all(len(task) <= 3 and sum(map(len, task[:-1])) < 10 for task in tasks)
    assert all(len(block) <= 2 and sum(len(t) for task in block[:-1] for t in task) < 20 for block in blocks)


def test_a_tokenizer_is_replaced_whole_or_not_at_all(source):
    train(source)
    before = content(source.parent)
    assert "tok/tokenizer.json" in before
    with file_limit(500), pytest.raises(OutputError, match="tok: cannot be written"):
        train(source, overwrite=True)
    assert content(source.parent) == before
    with other_process(HOLD, "folder", source.parent / "tok") as other:
        assert other.line() == "holds"
        with pytest.raises(OutputError, match="tok: process .* is writing it"):
            train(source, overwrite=True)
        other.kill()
    train(source, overwrite=True)
    assert content(source.parent).keys() == before.keys()


def test_a_folder_of_other_files_is_no_tokenizer_to_replace(source):
    with pytest.raises(DataError, match="holds in.jsonl, which is no tokenizer's and would be lost"):
        train(source, output=str(source.parent), overwrite=True)
    assert source.exists()
