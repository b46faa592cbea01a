# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Reading validation scalars back from TensorBoard event files."""

import time

import pytest
from torch.utils.tensorboard import SummaryWriter

from nemo_ee.errors import DataError
from nemo_ee.report.schema import CurvePoint
from nemo_ee.report.tuning_curve import read_tuning_curve


def log(directory, scalars, started):
    """One event file; ``scalars`` are (tag, value, step), ``started`` orders the files in time."""
    writer = SummaryWriter(str(directory))
    for tag, value, step in scalars:
        writer.add_scalar(tag, value, step, walltime=started + step / 1000)
    writer.close()


def test_points_per_exit_and_step(tmp_path):
    scalars = [
        ("consumed_tokens", 1000.0, 9),
        ("consumed_tokens", 2000.0, 19),
        ("reduced_train_loss", 1.0, 9),
    ]
    for step, loss in ((10, 5.0), (20, 4.5)):
        scalars += [("val_loss/exit_10", loss, step), ("val_loss/final", 2.5, step)]
        scalars += [("val_agreement/exit_10", 0.25, step), ("val_confidence/exit_10", 0.125, step)]
    log(tmp_path, scalars, 100.0)
    assert read_tuning_curve(tmp_path) == (
        CurvePoint(10, 10, 5.0, 1000, 0.25, 0.125),
        CurvePoint(10, None, 2.5, 1000),
        CurvePoint(20, 10, 4.5, 2000, 0.25, 0.125),
        CurvePoint(20, None, 2.5, 2000),
    )


def test_later_run_wins_wherever_its_file_lies(tmp_path):
    later = time.time()
    log(tmp_path, [("val_loss/exit_2", 3.0, 20), ("val_loss/exit_2", 2.0, 30)], later)
    log(tmp_path / "run_0", [("val_loss/exit_2", 5.0, 10), ("val_loss/exit_2", 4.0, 20)], later - 60)
    assert [(point.step, point.loss) for point in read_tuning_curve(tmp_path)] == [
        (10, 5.0),
        (20, 3.0),
        (30, 2.0),
    ]


def test_exits_are_ordered_by_number_and_tokens_may_be_missing(tmp_path):
    log(
        tmp_path,
        [(f"val_loss/exit_{layer}", 1.0, 5) for layer in (10, 9)] + [("val_loss/final", 1.0, 5)],
        1.0,
    )
    points = read_tuning_curve(tmp_path)
    assert [point.layer for point in points] == [9, 10, None]
    assert {point.tokens for point in points} == {None}


def test_directory_without_event_files_is_an_error(tmp_path):
    with pytest.raises(DataError, match="must hold TensorBoard event files"):
        read_tuning_curve(tmp_path)
    with pytest.raises(DataError, match="^logs=.*: must hold"):
        read_tuning_curve(tmp_path, key="logs")
