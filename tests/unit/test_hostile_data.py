# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Text and datasets that are not what they should be: one message each, soon, with little memory, and nothing lost."""

import json
import os
import pickle
import time
import tracemalloc

import numpy as np
import pytest

from nemo_ee.data import text_file
from nemo_ee.data.chats.chat_template import messages_of
from nemo_ee.data.chats.json_lines import JsonLines
from nemo_ee.data.checks import check_indexed_dataset
from nemo_ee.errors import ConfigError, DataError, printable
from nemo_ee.preprocessing.documents import find_input_files, iter_documents
from nemo_ee.preprocessing.survey import Rules, kept_documents, survey_documents
from nemo_ee.running.prompt_file import read_prompt_file, read_texts
from tests.support import hostile_data
from tests.support.other_process import other_process


def read_documents(path):
    return survey_documents([str(path)], Rules("file", "text"), deduplicate=True)


def read_json_lines(path):
    lines = JsonLines(str(path))
    return [lines[i] for i in range(len(lines))]


READERS = {
    "documents": (read_documents, DataError),
    "fine-tuning": (read_json_lines, DataError),
    "prompts": (lambda path: read_prompt_file(str(path), "prompts.file"), ConfigError),
    "texts": (lambda path: read_texts(str(path), "prompts_file"), ConfigError),
}


@pytest.fixture(autouse=True)
def soon():
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < 5, "a second, on a machine with nothing else to do"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", hostile_data.LINES)
def test_a_hostile_line_is_named(reader, name, tmp_path):
    path = hostile_data.write_line(tmp_path, name)
    read, kind = READERS[reader]
    with pytest.raises(kind, match=hostile_data.LINES[name].said) as error:
        read(path)
    message = str(error.value)
    assert str(path) in message and any(place in message for place in ("line 2", "record 2", ".jsonl:2"))
    assert len(message) < 600 and "\n" not in message


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", hostile_data.FILES)
def test_what_is_no_file_of_lines_is_named(reader, name, tmp_path):
    build, said = hostile_data.FILES[name]
    path = build(tmp_path)
    read, kind = READERS[reader]
    with pytest.raises(kind, match=said) as error:
        read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_large_files_that_would_be_read_as_a_whole_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"large.json: has more than 536870912 bytes.*name it .jsonl"):
        read_documents(hostile_data.large_json(tmp_path))
    with pytest.raises(DataError, match=r"long.txt: has more than 16777216 bytes.*document=paragraph"):
        read_documents(hostile_data.long_text(tmp_path))
    with pytest.raises(DataError, match="line 2 has more than 16777216 bytes"):
        list(iter_documents(tmp_path / "long.txt", "line", "text"))
    large = hostile_data.large_json(tmp_path).rename(tmp_path / "large.txt")
    with pytest.raises(ConfigError, match="prompts_file=.*line 1 has more than 16777216 bytes"):
        read_texts(str(large), "prompts_file")


def test_long_documents_are_refused_in_every_form(tmp_path):
    texts = {
        ("a.txt", "paragraph"): b"short\n\n" + b"a line\n" * 20,
        ("a.txt", "file"): b"a line\n" * 20,
        ("a.txt", "line"): b"short\n" + b"a" * 101,
        ("a.jsonl", "file"): b'"short"\n"' + b"a" * 99 + b'"\n',
        ("a.json", "file"): b'["short", "' + b"a" * 101 + b'"]',
    }
    for (name, rule), content in texts.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}.*more than .*100.*longest_document|document=line"):
            list(iter_documents(tmp_path / name, rule, "text", longest=100))
    (tmp_path / "a.jsonl").write_bytes(b'"short"\n"' + b"a" * 97 + b'"\n')
    assert [len(text) for text in iter_documents(tmp_path / "a.jsonl", "file", "text", longest=100)] == [
        5,
        97,
    ]


def test_a_process_that_meets_a_long_line_stays_small(tmp_path):
    code = """
    import resource, sys
    from nemo_ee.preprocessing.survey import Rules, survey_documents
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        survey_documents([sys.argv[1]], Rules("file", "text"), True)
    except ValueError as error:
        print(error)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    with other_process(code, hostile_data.long_line(tmp_path)) as process:
        assert "line 2 has more than" in process.line()
        assert int(process.line()) < 100 * 1024  # KiB


def test_links_in_a_circle_are_not_followed(tmp_path):
    pattern = hostile_data.folders_in_a_circle(tmp_path)
    expected = [tmp_path / "a" / "b" / "deep.jsonl"]
    assert find_input_files([str(pattern)]) == find_input_files([str(tmp_path)]) == expected
    assert find_input_files([str(tmp_path / "**")]) == expected
    assert find_input_files([str(tmp_path / "a" / "**" / "**" / "*.jsonl")]) == expected
    assert find_input_files([str(tmp_path / "a" / "link0" / "a" / "*" / "*.jsonl")]) != []


def test_patterns_match_what_glob_matches(tmp_path, monkeypatch):
    import glob

    for name in ("a.txt", "x/b.txt", "x/y/c.txt", "x/y/c.jsonl", ".hidden/d.txt", "x/.e.txt", "x/y[1]/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    monkeypatch.chdir(tmp_path)
    for folder in ("", f"{tmp_path}/"):
        for pattern in ("**/*.txt", "x/**/*.txt", "**/y/*.txt", "*.txt", "**/y*/**/*.txt", "x/**/c.*"):
            found = [str(path) for path in find_input_files([folder + pattern])]
            assert found == sorted(glob.glob(folder + pattern, recursive=True)), pattern


def test_whole_characters_written_as_two_halves_pass(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "😀 caf\u00e9 \\ud800"}) + "\n")
    assert "\\ud83d\\ude00" in path.read_text()
    assert read_documents(path).documents == 1
    assert read_json_lines(path) == [{"text": "😀 caf\u00e9 \\ud800"}]


@pytest.mark.parametrize(
    "content",
    [
        "one\ntwo\n\nthree",
        "one\r\ntwo\r\n\r\nthree\r\n",
        "one\rtwo\r\rthree\r",
        "one\r\r\ntwo\u2028and\x0bmore\x85\x1c\n\r\n three\n",
        "\ufeffone\n",
        "\r",
        "",
    ],
)
@pytest.mark.parametrize("rule", ["file", "line", "paragraph"])
def test_text_is_read_as_python_reads_it(content, rule, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    with path.open(encoding="utf-8-sig") as stream:
        lines = list(stream)
    expected = ["".join(lines)]
    if rule == "line":
        expected = [line.rstrip("\n") for line in lines if line.strip()]
    if rule == "paragraph":
        expected, paragraph = [], []
        for line in [*lines, "\n"]:
            if line.strip():
                paragraph.append(line)
            elif paragraph:
                expected.append("".join(paragraph).rstrip("\n"))
                paragraph = []
    assert list(iter_documents(path, rule, "text")) == expected


def test_an_input_that_changes_between_its_readings_is_noticed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(hostile_data.HONEST * 3)
    for change in (
        lambda: path.write_bytes(hostile_data.HONEST * 4),  # which a count of records would not tell
        lambda: path.write_bytes(hostile_data.HONEST),
        lambda: os.utime(path, ns=(1, 1)),
        lambda: path.unlink(),
    ):
        path.write_bytes(hostile_data.HONEST * 3)
        survey = survey_documents([str(path)], Rules("file", "text"), deduplicate=False)
        assert len(list(kept_documents(survey))) == 3
        change()
        with pytest.raises(
            DataError, match=r"a.jsonl: must not (change|vanish) while it is read; start again"
        ):
            list(kept_documents(survey))


def test_an_input_that_changes_while_it_is_read_is_noticed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(hostile_data.HONEST * 1000)
    survey = survey_documents([str(path)], Rules("file", "text"), deduplicate=False)
    documents = kept_documents(survey)
    next(documents)
    path.write_bytes(hostile_data.HONEST * 1001)
    with pytest.raises(DataError, match="must not change"):
        list(documents)


def test_a_file_that_shrinks_while_lines_are_read_is_an_error_and_no_signal(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(hostile_data.HONEST * 2000)
    lines = JsonLines(str(path))
    os.truncate(path, 10)
    with pytest.raises(DataError, match="line 1500 is gone: the file must not change"):
        lines[1499]


def test_lines_are_found_across_blocks_and_in_other_processes(tmp_path, monkeypatch):
    from nemo_ee.data.chats import json_lines

    path = tmp_path / "a.jsonl"
    rng = np.random.default_rng(1)
    for end in (b"", b"\n", b"\r\n", b"\r"):
        parts = [b"\n", b"\r\n", b'{"a": 1}\n', b'{"a": 22}\r\n', b'{"a": 333}\n']
        path.write_bytes(b"".join(parts[i] for i in rng.integers(0, 5, 40)) + b'{"a": 4}' + end)
        lines = path.read_bytes().split(b"\n")
        expected = [(n, json.loads(line)) for n, line in enumerate(lines, start=1) if line.strip(b"\r")]
        for block in (1, 2, 3, 7, 1 << 20):
            monkeypatch.setattr(json_lines, "_BLOCK", block)
            found = JsonLines(str(path))
            assert [(found._numbers[i], found[i]) for i in range(len(found))] == expected
        again = pickle.loads(pickle.dumps(found))
        assert again[0] == found[0] and again.where(3) == found.where(3)


def test_a_text_that_is_too_long_for_its_kind_names_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_ee.data.chats.json_lines.LONGEST_LINE", 30)
    path = tmp_path / "a.jsonl"
    path.write_bytes(hostile_data.HONEST + b'{"a": "' + b"b" * 30 + b'"}\n')
    with pytest.raises(DataError, match="line 2 has 39 bytes, more than 30"):
        JsonLines(str(path))
    assert text_file.LONGEST_LINE == 16 * 2**20


def test_an_honest_dataset_passes(tmp_path):
    prefix = hostile_data.indexed_dataset(tmp_path / "data")
    assert check_indexed_dataset(str(prefix), 4, 100, "text").tokens == 5


@pytest.mark.parametrize("name", hostile_data.DATASETS)
def test_a_hostile_dataset_is_named(name, tmp_path):
    changes, said = hostile_data.DATASETS[name]
    prefix = hostile_data.indexed_dataset(tmp_path / "data", **changes)
    with pytest.raises(DataError, match=said) as error:
        check_indexed_dataset(str(prefix), 4, 100, "text")
    assert "model.data.data_prefix" in str(error.value) and "preprocess" in str(error.value)


def test_an_index_is_checked_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_ee.data.index_file._BLOCK", 3)
    lengths = [1, 0, 2, 3, 1, 1, 0, 2]
    ids = range(1, 11)
    prefix = hostile_data.indexed_dataset(tmp_path / "data", lengths, ids=ids)
    assert check_indexed_dataset(str(prefix), 4, 100, "text").tokens == 10
    pointers = [0, *(2 * np.cumsum(lengths[:-1]))]
    for place in range(8):
        wrong = [*pointers]
        wrong[place] += 2
        hostile_data.indexed_dataset(tmp_path / "data", lengths, wrong, ids=ids)
        with pytest.raises(DataError, match=f"sequence {place} lies at {wrong[place]}"):
            check_indexed_dataset(str(prefix), 4, 100, "text")
    for place in range(1, 8):
        documents = [*range(9)]
        documents[place] = 8 if place < 7 else 5
        hostile_data.indexed_dataset(tmp_path / "data", lengths, documents=documents, ids=ids)
        with pytest.raises(DataError, match="its documents are not those of its 8 sequences"):
            check_indexed_dataset(str(prefix), 4, 100, "text")


def test_a_small_json_file_takes_little_memory(tmp_path):
    path = tmp_path / "small.json"
    path.write_text('["the cat"]')
    tracemalloc.start()
    try:
        assert list(iter_documents(path, "file", "text")) == ["the cat"]
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_keys_that_an_error_lists_stay_in_its_line(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"a\\nb": 1}\n')
    with pytest.raises(DataError) as error:
        list(iter_documents(path, "file", "text"))
    assert "\n" not in str(error.value) and r"'a\nb'" in str(error.value)


@pytest.mark.parametrize("key", ("system", "mask"))
def test_chats_whose_system_or_mask_is_no_text(key):
    line = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], key: ["x"]}
    with pytest.raises(ValueError, match=f"has '{key}' that is no text"):
        messages_of(line)


def test_characters_that_steer_a_terminal_are_written_out():
    assert printable(DataError("a\x1b[2Jb\udc80é\nc")) == "a\\x1b[2Jb\\udc80é\nc"
