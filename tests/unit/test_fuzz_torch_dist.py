# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""torch_dist checkpoints made at random: read as torch reads them, or refused by one error with their name."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from nemo_ee.checkpoint.torch_dist import TorchDistCheckpoint
from nemo_ee.errors import CheckpointError
from tests.support import hostile_weights
from tests.support.fuzz import EXAMPLES, fuzz, refusal_of
from tests.support.torch_dist_examples import folders


def read(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors, and the objects unpickled."""
    checkpoint = TorchDistCheckpoint(directory)
    checkpoint.check_stored_sizes()
    for key in checkpoint.object_keys:
        checkpoint.read_object(key)
    return {key: checkpoint.read(key) for key in checkpoint.tensors}


@pytest.mark.parametrize("examples", EXAMPLES)
def test_folders(examples, tmp_path, monkeypatch):
    """What is accepted has the tensors that torch.distributed.checkpoint loads; no code runs."""
    monkeypatch.chdir(tmp_path)
    honest = hostile_weights.write_torch_dist(tmp_path / "honest", hostile_weights.tensors())
    directory = tmp_path / "c"

    def known():
        for spoil, _ in hostile_weights.FOLDERS.values():
            shutil.copytree(honest, tmp_path / "spoilt", dirs_exist_ok=True)
            spoil(tmp_path / "spoilt")
            yield {file.name: file.read_bytes() for file in (tmp_path / "spoilt").iterdir() if file.is_file()}
            shutil.rmtree(tmp_path / "spoilt")

    def check(files: dict[str, bytes]) -> bool:
        shutil.copytree(honest, directory)
        try:
            for name, data in files.items():
                (directory / name).write_bytes(data)
            found, refused = refusal_of(lambda: read(directory), CheckpointError, directory)
            assert not (tmp_path / "ran").exists()
            if refused:
                return False
            theirs = {key: torch.zeros_like(value) for key, value in found.items()}
            dcp.load(theirs, checkpoint_id=directory, no_dist=True)
            for key, value in found.items():
                assert value.dtype == theirs[key].dtype
                torch.testing.assert_close(value, theirs[key], rtol=0, atol=0, equal_nan=True)
            return True
        finally:
            shutil.rmtree(directory)

    assert fuzz(folders(honest), check, examples, known()) > examples / 20
