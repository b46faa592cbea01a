# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The timetable by which the benchmark of pipeline decoding predicts, against some that were laid out by hand."""

import itertools
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"))

from pipeline_timetable import token_times  # noqa: E402

CLOSE = dict(abs=1e-3)
"""Messages take a millionth of a pass each."""


@pytest.mark.parametrize("passed", [[4, 1, 1, 1], [4, 3, 3], [4, 1, 3, 1, 4, 2, 2, 1]])
def test_a_sequence_alone_takes_the_time_to_its_exits_stages(passed):
    (times,) = token_times([passed])
    assert times == pytest.approx(list(itertools.accumulate(passed)), **CLOSE)


def test_sequences_that_leave_alike_go_on_together():
    (alone,) = token_times([[4, 2, 1, 4]])
    assert token_times([[4, 2, 1, 4]] * 3) == [alone] * 3


def test_an_answer_that_comes_as_a_pass_would_begin_is_waited_for():
    """Both start at 2. One goes on at 3, and at 4 with the other, whose answer leaves the second stage then."""
    one, other = token_times([[2, 1, 1, 1], [2, 2, 2]])
    assert one == pytest.approx([2, 3, 4, 5], **CLOSE)
    assert other == pytest.approx([2, 4, 6], **CLOSE)


def test_an_answer_that_comes_while_a_pass_runs_waits_for_its_end():
    """The one's answer of the second stage comes half a pass after a pass began that the other fills."""
    one, other = token_times([[2, 1.5, 1], [2, 1, 1, 1]])
    assert other == pytest.approx([2, 3, 4, 5], **CLOSE)
    assert one == pytest.approx([2, 4, 5], **CLOSE)


def test_the_last_token_keeps_nobody_waiting():
    one, other = token_times([[3, 3], [3, 1, 2]])
    assert other == pytest.approx([3, 4, 6], **CLOSE)
    assert one == pytest.approx([3, 6], **CLOSE)
