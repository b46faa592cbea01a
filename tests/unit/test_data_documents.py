# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which files are read, and what counts as a document in each."""

import errno
import json
import os
import re
import subprocess

import pytest

from nemo_ee.data.split import assign_splits
from nemo_ee.errors import DataError
from nemo_ee.preprocessing.documents import find_input_files, iter_documents

TEXT = "first line\nsecond line\n\n  \nnew paragraph\n"


def documents(path, rule="file", key="text"):
    return list(iter_documents(path, rule, key))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("file", [TEXT]),
        ("line", ["first line", "second line", "new paragraph"]),
        ("paragraph", ["first line\nsecond line", "new paragraph"]),
    ],
)
def test_txt_document_rules(tmp_path, rule, expected):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    assert documents(path, rule) == expected


def test_byte_order_mark_is_dropped(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert documents(path) == ["hello"]


def test_jsonl_takes_objects_and_strings(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n"two"\n')
    assert documents(path) == ["one", "two"]


@pytest.mark.parametrize(
    "content",
    [
        [{"extract": "one"}, {"extract": "two"}],
        {"One": {"extract": "one", "title": "One"}, "Two": {"extract": "two"}},
        ["one", "two"],
        {"One": "one", "Two": "two"},
    ],
)
def test_json_takes_lists_and_objects_of_records(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    assert documents(path, key="extract") == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "one"}\n{"body": "two"}\n', r"record 2 has no key 'text'.*\(body\)"),
        ("a.jsonl", '{"text": "one"}\n{"text": \n', "line 2 is no JSON"),
        ("a.jsonl", '{"text": 3}\n', "record 1: 'text' must be text, not int"),
        ("a.json", '{"A": {"text": "one"}, "B": {"body": "two"}}', r"record 2 \('B'\) has no key 'text'"),
        ("a.json", "[1]", "record 1 must be a string or an object"),
        ("a.json", "3", "must be a list or an object of records"),
        ("a.json", '{"text": "one"}\n{"text": "two"}\n', "name it .jsonl"),
        ("a.txt", b"caf\xe9", "must be UTF-8 text, byte 3 is not"),
    ],
)
def test_bad_content_names_file_and_record(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as error:
        documents(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("encoding", ["LATIN1", "UTF-16"])
def test_what_is_said_of_other_encodings_converts_them(tmp_path, encoding):
    given, converted = tmp_path / "a.txt", tmp_path / "b.txt"
    given.write_text("caf\xe9\n", encoding=encoding)
    with pytest.raises(DataError) as error:
        documents(given)
    command = re.search(r"\((iconv .*)\)", str(error.value))[1].replace("ENCODING", encoding).split()
    converted.write_bytes(subprocess.run([*command, given], capture_output=True, check=True).stdout)
    assert documents(converted, "line") == ["caf\xe9"]


def test_a_file_that_cannot_be_looked_at_is_named(tmp_path, monkeypatch):
    """In a folder that may be listed and not entered."""
    (tmp_path / "sub").mkdir()
    closed = tmp_path / "sub" / "a.txt"
    closed.touch()
    stat = os.stat

    def refusing(path, *, follow_symlinks=True, **place):
        if os.fspath(path) == str(closed):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, follow_symlinks=follow_symlinks, **place)

    monkeypatch.setattr(os, "stat", refusing)
    for name in (tmp_path, tmp_path / "**" / "*.txt"):
        with pytest.raises(DataError, match=rf"input={closed}: cannot be read \(Permission denied\)"):
            find_input_files([str(name)])


def test_inputs_expand_in_a_stable_order_and_only_once(tmp_path):
    for name in ("b.txt", "a.jsonl", "sub/c.json", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_input_files([str(tmp_path / "b.txt"), str(tmp_path), str(tmp_path / "*.txt")])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["b.txt", "a.jsonl", "sub/c.json"]


@pytest.mark.parametrize("name", ["missing.txt", "missing/*.txt", "empty_directory", "notes.md"])
def test_inputs_that_give_no_text_are_refused(tmp_path, name):
    (tmp_path / "empty_directory").mkdir()
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match="must"):
        find_input_files([str(tmp_path / name)])


def test_split_has_exact_counts_and_depends_on_the_seed():
    shares = {"train": 0.8, "validation": 0.15, "test": 0.05}
    labels = assign_splits(200, shares, seed=3)
    assert {name: labels.count(name) for name in shares} == {"train": 160, "validation": 30, "test": 10}
    assert labels == assign_splits(200, shares, seed=3)
    assert labels != assign_splits(200, shares, seed=4)
    assert labels != sorted(labels, key=list(shares).index), "the split must be drawn, not cut"


def test_every_split_gets_a_document():
    labels = assign_splits(3, {"train": 0.98, "validation": 0.01, "test": 0.01}, seed=0)
    assert sorted(labels) == ["test", "train", "validation"]
    with pytest.raises(DataError, match="at least one document per split, the input has 1"):
        assign_splits(1, {"train": 0.9, "validation": 0.1}, seed=0)
