# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Work of one rank, and one file of several: a failure of any is a failure of all, and leaves the old file."""

from pathlib import Path

import pytest
import torch.distributed as dist

from nemo_ee.checkpoint import archive, shared_archive
from nemo_ee.errors import CheckpointError, ConfigError, Fault
from nemo_ee.runtime import collective


def save(path: str, failing: str | None) -> str | None:
    """Saves with a failure on rank 1, where its weights are written, or on rank 0 afterwards."""

    def write_weights(directory: Path) -> None:
        if dist.get_rank() == 1 and failing == "weights":
            raise OSError("disk full")
        directory.mkdir(exist_ok=True)
        (directory / f"rank_{dist.get_rank()}").write_text("weights")

    def write_rest(directory: Path) -> None:
        if failing == "rest":
            raise OSError("disk full")
        (directory / archive.CONFIG_NAME).write_text("new: true\n")

    try:
        shared_archive.save_archive(path, write_weights, write_rest)
    except (OSError, CheckpointError) as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize(
    ("failing", "messages"),
    [
        ("weights", ["CheckpointError: rank 1 failed: OSError: disk full", "OSError: disk full"]),
        ("rest", ["OSError: disk full", "OSError: disk full"]),
    ],
)
def test_a_failure_reaches_every_rank(workers, tmp_path, failing, messages):
    path = tmp_path / "model.nemo"
    path.write_text("old")
    assert workers(2).run(save, str(path), failing, timeout=60) == messages
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_without_one_the_file_is_whole(workers, tmp_path):
    path = tmp_path / "model.nemo"
    assert workers(2).run(save, str(path), None) == [None, None]
    root = archive.extract(path, tmp_path / "content")
    assert {file.name for file in (root / archive.WEIGHTS_DIRECTORY).iterdir()} == {"rank_0", "rank_1"}


def share(ends: str) -> tuple[str, str] | None:
    """What ranks 1 and 2 of three get of what the former does."""

    class Local(Exception):
        """Cannot be pickled."""

    def work() -> str:
        errors = {
            "fault": ConfigError(Fault("a", 1, "rule", "remedy")),
            "local": Local("why"),
            "exit": SystemExit(3),
        }
        if ends in errors:
            raise errors[ends]
        return f"of rank {dist.get_rank()}"

    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return None
    try:
        return "result", collective.on_first_rank(work, group)
    except BaseException as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize(
    ("ends", "first", "second"),
    [
        ("well", ("result", "of rank 1"), ("result", "of rank 1")),
        ("fault", ("ConfigError", "a=1: rule; remedy"), ("ConfigError", "a=1: rule; remedy")),
        ("local", ("Local", "why"), ("RuntimeError", "Local: why")),
        ("exit", ("SystemExit", "3"), ("SystemExit", "3")),
    ],
)
def test_all_get_what_the_first_of_a_group_gets_or_raises(workers, ends, first, second):
    assert workers(3).run(share, ends, timeout=60) == [None, first, second]
