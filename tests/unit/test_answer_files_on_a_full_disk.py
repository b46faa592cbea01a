# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Answers that a model writes, where the disk is full in the middle of a block, or when they are published."""

import pytest

from nemo_ee.errors import OutputError
from nemo_ee.tuning_text.answer_files import AnswerFiles, Progress
from tests.support.full_disk import file_limit

SETTINGS = {"seed": 1}


def test_a_full_disk_is_an_error_and_the_run_goes_on(tmp_path):
    prefix = str(tmp_path / "chats")
    files = AnswerFiles(prefix, SETTINGS)
    files.append([{"x": "first"}], Progress(prompts=1, answers=1))
    with (
        file_limit(300),
        pytest.raises(
            OutputError, match=r"partial\.jsonl: cannot be written: .*; make room, then give the same"
        ),
    ):
        files.append([{"x": "z" * 500}], Progress(prompts=2, answers=2))
    again = AnswerFiles(prefix, SETTINGS)
    assert again.progress.prompts == 1
    again.append([{"x": "second"}], Progress(prompts=2, answers=2))
    again.publish(0.0)
    assert again.train.read_text() == '{"x": "first"}\n{"x": "second"}\n'


def test_a_full_disk_while_publishing_keeps_the_answers_and_what_was_there(tmp_path):
    prefix = str(tmp_path / "chats")
    (tmp_path / "chats_train.jsonl").write_text("of another run\n")
    files = AnswerFiles(prefix, SETTINGS)
    files.append([{"x": f"{n} {'z' * 50}"} for n in range(20)], Progress(prompts=20, answers=20))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with file_limit(300), pytest.raises(OutputError, match="chats_train.jsonl: cannot be written"):
        files.publish(0.1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    again = AnswerFiles(prefix, SETTINGS)
    again.publish(0.1)
    assert len(again.train.read_text().splitlines()) == 18
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"chats_train.jsonl", "chats_validation.jsonl", "chats.json"}


def test_what_a_run_left_that_was_killed_when_all_was_there_is_cleared(tmp_path):
    files = AnswerFiles(str(tmp_path / "chats"), SETTINGS)
    files.append([{"x": "first"}], Progress(prompts=1, answers=1))
    partial = [path for path in tmp_path.iterdir()]
    kept = {path: path.read_bytes() for path in partial}
    files.publish(0.0)
    for path, content in kept.items():
        path.write_bytes(content)
    again = AnswerFiles(str(tmp_path / "chats"), SETTINGS)
    assert again.complete
    again.clear()
    assert {path.name for path in tmp_path.iterdir()} == {"chats_train.jsonl", "chats.json"}
