# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Writing one file with several ranks: a failure of any is a failure of all, and leaves the old file."""

from pathlib import Path

import pytest
import torch.distributed as dist

from nemo_ee.checkpoint import archive, shared_archive
from nemo_ee.errors import CheckpointError


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
