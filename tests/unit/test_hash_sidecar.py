# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A base's content hash is kept beside it, and counts only for the files that it was computed from."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from nemo_ee.checkpoint import archive, hash_sidecar
from nemo_ee.checkpoint.content_hash import backbone_content_hash
from nemo_ee.checkpoint.conversion import base
from nemo_ee.checkpoint.conversion.base import BaseCheckpoint
from nemo_ee.errors import CheckpointError, OutputError
from tests.unit.test_checkpoint_content_hash import write_torch_dist

OTHER = "0" * 64


@pytest.fixture(autouse=True)
def hashed(monkeypatch):
    """What is read whole to compute its hash; files count as old at once."""
    read = []

    def compute(path):
        read.append(Path(path))
        return backbone_content_hash(path)

    monkeypatch.setattr(base, "backbone_content_hash", compute)
    monkeypatch.setattr(hash_sidecar, "SETTLED_NS", -1)
    return read


def write(path: Path, value: float, packed: bool) -> Path:
    """A checkpoint of one number, as a file or as an extracted directory; whatever was there is replaced."""
    tree = path.parent / f"tree of {value}" if packed else path
    tree.mkdir(parents=True, exist_ok=True)
    (tree / archive.CONFIG_NAME).write_text("a: 1\n")
    write_torch_dist(
        tree / archive.WEIGHTS_DIRECTORY, {"model.decoder.final_layernorm.weight": torch.tensor([value])}
    )
    return archive.write_archive(tree, path) if packed else path


@pytest.fixture(params=[True, False], ids=["file", "directory"])
def checkpoint(request, tmp_path):
    (tmp_path / "folder").mkdir()
    return write(tmp_path / "folder" / "base.nemo", 1.0, request.param)


def beside(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + ".content_hash.json")


def test_it_is_read_once(checkpoint, hashed):
    expected = backbone_content_hash(checkpoint)
    assert [BaseCheckpoint(checkpoint).content_hash for _ in range(3)] == [expected] * 3
    assert hashed == [checkpoint]
    assert {path.name for path in checkpoint.parent.iterdir()} - {"tree of 1.0"} == {
        checkpoint.name,
        beside(checkpoint).name,
    }, "nothing else is left beside it, and nothing in it"


@pytest.mark.parametrize("packed", [True, False], ids=["file", "directory"])
def test_another_checkpoint_of_the_same_size_and_time_has_its_own(packed, tmp_path, hashed):
    path = write(tmp_path / "base.nemo", 1.0, packed)
    first = BaseCheckpoint(path).content_hash
    times = {each: each.stat() for each in [path, *path.rglob("*")]}
    write(path, 2.0, packed)
    for each, status in times.items():
        if each.exists():
            os.utime(each, ns=(status.st_atime_ns, status.st_mtime_ns))
    if packed:
        assert path.stat().st_size == times[path].st_size, "else this test would show nothing"
        assert path.stat().st_mtime_ns == times[path].st_mtime_ns
    second = BaseCheckpoint(path).content_hash
    assert second == backbone_content_hash(path) != first
    assert BaseCheckpoint(path).content_hash == second and len(hashed) == 2, (
        "the new one is kept in its place"
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b"[" * 4000,
        b'{"version": 1}' + b" " * 10_000,
        json.dumps({"version": 2, "stamp": "STAMP", "content_hash": OTHER}).encode(),
        json.dumps({"version": 1, "stamp": "STAMP", "content_hash": "../../etc"}).encode(),
        json.dumps({"version": 1, "stamp": "STAMP", "content_hash": OTHER.upper() + "\n"}).encode(),
        json.dumps({"version": 1, "stamp": "STAMP", "content_hash": [OTHER]}).encode(),
        json.dumps({"version": 1, "stamp": None, "content_hash": OTHER}).encode(),
        json.dumps({"version": 1, "stamp": "file 1 2 3", "content_hash": OTHER}).encode(),
    ],
)
def test_what_is_damaged_or_of_another_file_is_replaced(checkpoint, content, hashed):
    stamp = hash_sidecar.stamp_of(checkpoint)
    beside(checkpoint).write_bytes(content.replace(b"STAMP", stamp.encode()))
    expected = backbone_content_hash(checkpoint)
    assert BaseCheckpoint(checkpoint).content_hash == expected
    assert json.loads(beside(checkpoint).read_text())["content_hash"] == expected
    assert BaseCheckpoint(checkpoint).content_hash == expected and len(hashed) == 1


def test_only_a_plain_file_is_read(checkpoint, tmp_path, hashed):
    stamp = hash_sidecar.stamp_of(checkpoint)
    target = tmp_path / "target"
    target.write_text(json.dumps({"version": 1, "stamp": stamp, "content_hash": OTHER}))
    expected = backbone_content_hash(checkpoint)
    before = target.read_text()
    for make in (lambda: beside(checkpoint).symlink_to(target), lambda: os.mkfifo(beside(checkpoint))):
        make()
        assert BaseCheckpoint(checkpoint).content_hash == expected
        assert (
            beside(checkpoint).is_file()
            and not beside(checkpoint).is_symlink()
            and target.read_text() == before
        )
        beside(checkpoint).unlink()
    beside(checkpoint).mkdir()
    assert BaseCheckpoint(checkpoint).content_hash == expected, "and without room for it there is none"
    assert len(hashed) == 3


def test_where_it_cannot_be_written_the_hash_is_computed_each_time(checkpoint, hashed, monkeypatch):
    def refuse(*_args, **_settings):
        raise OutputError("read-only")

    monkeypatch.setattr(hash_sidecar, "replaced_file", refuse)
    expected = backbone_content_hash(checkpoint)
    assert [BaseCheckpoint(checkpoint).content_hash for _ in range(2)] == [expected] * 2
    assert len(hashed) == 2 and not beside(checkpoint).exists()


def test_a_file_that_may_still_change_unseen_keeps_none(checkpoint, hashed, monkeypatch):
    monkeypatch.setattr(hash_sidecar, "SETTLED_NS", 10**12)
    BaseCheckpoint(checkpoint).hash_now()
    assert not beside(checkpoint).exists()


def test_a_file_that_changed_since_it_was_restored_is_refused_with_its_hash_kept(checkpoint):
    restored = BaseCheckpoint(checkpoint)
    BaseCheckpoint(checkpoint).hash_now()
    files = [checkpoint] if checkpoint.is_file() else list(checkpoint.rglob("*.distcp"))
    with files[0].open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(CheckpointError, match="has changed since the model was restored"):
        restored.hash_now()


def test_many_at_once(checkpoint):
    expected = backbone_content_hash(checkpoint)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: BaseCheckpoint(checkpoint).content_hash, range(24)))
    assert found == [expected] * 24
    assert json.loads(beside(checkpoint).read_text())["content_hash"] == expected
