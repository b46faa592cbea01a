# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Answers that a model writes, where the disk is full in the middle of a block."""

import resource
import signal

import pytest

from nemo_ee.errors import DataError
from nemo_ee.tuning_text.answer_files import AnswerFiles, Progress


def test_a_full_disk_is_an_error_and_the_run_goes_on(tmp_path):
    prefix, settings = str(tmp_path / "chats"), {"seed": 1}
    files = AnswerFiles(prefix, settings)
    files.append([{"x": "first"}], Progress(prompts=1, answers=1))
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    try:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
        with pytest.raises(DataError, match=r"partial\.jsonl: could not be written .*make room"):
            files.append([{"x": "z" * 500}], Progress(prompts=2, answers=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    again = AnswerFiles(prefix, settings)
    assert again.progress.prompts == 1
    again.append([{"x": "second"}], Progress(prompts=2, answers=2))
    again.publish(0.0)
    assert again.train.read_text() == '{"x": "first"}\n{"x": "second"}\n'
