# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Archives are judged before extraction and replaced in one step."""

import gzip
import io
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_ee.checkpoint import archive
from nemo_ee.errors import CheckpointError

CONFIG = b"num_layers: 4\nhidden_size: 32\n"


def content(directory: Path) -> Path:
    (directory / "model_weights").mkdir(parents=True)
    (directory / "model_config.yaml").write_bytes(CONFIG)
    (directory / "model_weights" / "data").write_bytes(os.urandom(5000))
    return directory


def write_tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes | None]], mode: str = "w:") -> Path:
    with tarfile.open(path, mode) as tar:
        for info, data in members:
            if data is not None:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data) if data is not None else None)
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def assert_refused(path: Path, out: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        archive.extract(path, out)
    assert str(path) in str(error.value)
    assert "; " in str(error.value), "no remedy"
    for word in words:
        assert word in str(error.value)
    assert not out.exists(), "something was extracted"
    with pytest.raises(CheckpointError):
        archive.read_config(path)


def test_round_trip_as_file_and_as_directory(tmp_path):
    source = content(tmp_path / "source")
    path = archive.write_archive(source, tmp_path / "model.nemo")
    out = archive.extract(path, tmp_path / "out")
    for file in ("model_config.yaml", "model_weights/data"):
        assert (out / file).read_bytes() == (source / file).read_bytes()
    assert archive.read_config(path).num_layers == archive.read_config(source).num_layers == 4
    assert archive.extract(source, tmp_path / "unused") == source


def test_gzipped_archives_of_old_nemo_are_read(tmp_path):
    source = content(tmp_path / "source")
    with tarfile.open(tmp_path / "old.nemo", "w:gz") as tar:
        tar.add(source, arcname=".")
    assert archive.read_config(tmp_path / "old.nemo").hidden_size == 32
    assert (archive.extract(tmp_path / "old.nemo", tmp_path / "out") / "model_weights/data").is_file()


def test_config_nested_under_model_is_unwrapped(tmp_path):
    path = write_tar(tmp_path / "m.nemo", [(member("./model_config.yaml"), b"model:\n  num_layers: 7\n")])
    assert archive.read_config(path).num_layers == 7


def test_partial_extraction(tmp_path):
    path = archive.write_archive(content(tmp_path / "source"), tmp_path / "model.nemo")
    out = archive.extract(path, tmp_path / "out", want=lambda name: name == "model_config.yaml")
    assert [entry.name for entry in out.iterdir()] == ["model_config.yaml"]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (member("/etc/evil"), ("/etc/evil", "outside")),
        (member("../evil"), ("../evil", "outside")),
        (member("a/../../evil"), ("outside",)),
        (member("link", tarfile.SYMTYPE, "/etc/passwd"), ("link",)),
        (member("link", tarfile.LNKTYPE, "model_config.yaml"), ("link",)),
        (member("pipe", tarfile.FIFOTYPE), ("device",)),
        (member("disk", tarfile.BLKTYPE), ("device",)),
        (member("tty", tarfile.CHRTYPE), ("device",)),
        (member("model_config.yaml"), ("twice",)),
    ],
    ids=["absolute", "parent", "nested-parent", "symlink", "hardlink", "fifo", "block", "char", "duplicate"],
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_hostile_members_are_refused_before_anything_is_written(tmp_path, bad, words, first):
    good = (member("./model_config.yaml"), CONFIG)
    evil = (bad, b"x" if bad.isreg() else None)
    path = write_tar(tmp_path / "evil.nemo", [evil, good] if first else [good, evil])
    assert_refused(path, tmp_path / "out", *words)


def test_every_truncation_is_noticed(tmp_path):
    whole = archive.write_archive(content(tmp_path / "source"), tmp_path / "model.nemo").read_bytes()
    with tarfile.open(tmp_path / "model.nemo") as tar:
        end = max(entry.offset_data + entry.size for entry in tar.getmembers())
    cut = tmp_path / "cut.nemo"
    # at and beside every block boundary up to the end of the data; the padding behind it may be cut
    for size in sorted({size + delta for size in range(0, end, 512) for delta in (0, 1, 300)}):
        if size >= end:
            continue
        cut.write_bytes(whole[:size])
        assert_refused(cut, tmp_path / "out")


def test_truncated_gzip_is_noticed(tmp_path):
    source = content(tmp_path / "source")
    with tarfile.open(tmp_path / "old.nemo", "w:gz") as tar:
        tar.add(source, arcname=".")
    whole = (tmp_path / "old.nemo").read_bytes()
    for share in (0.1, 0.5, 0.9, 0.99):
        (tmp_path / "cut.nemo").write_bytes(whole[: int(len(whole) * share)])
        assert_refused(tmp_path / "cut.nemo", tmp_path / "out")


def test_a_gzip_whose_checksum_is_wrong_is_noticed(tmp_path):
    """A flipped bit of a tensor leaves the archive's structure as it was."""
    source = tmp_path / "plain.tar"
    write_tar(source, [(member("model_config.yaml"), CONFIG), (member("model_weights/data"), bytes(5000))])
    for position in (-8, -4):  # the checksum, and the length
        whole = bytearray(gzip.compress(source.read_bytes()))
        whole[position] ^= 1
        path = tmp_path / "damaged.nemo"
        path.write_bytes(whole)
        assert_refused(path, tmp_path / "out", "damaged")


@pytest.mark.parametrize("order", [("a", "a/b"), ("a/b/c", "a")])
def test_a_file_that_is_a_folder_too_is_refused(tmp_path, order):
    members = [(member(name), b"x") for name in order]
    path = write_tar(tmp_path / "m.nemo", [(member("model_config.yaml"), CONFIG), *members])
    assert_refused(path, tmp_path / "out", "'a', which is a file")


def test_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = archive.write_archive(content(tmp_path / "source"), tmp_path / "model.nemo")
    with tarfile.open(path) as tar:
        last = max(entry.offset for entry in tar.getmembers())
    data = bytearray(path.read_bytes())
    data[last] ^= 0xFF
    path.write_bytes(data)
    assert_refused(path, tmp_path / "out", "damaged")


def test_missing_foreign_and_empty_files(tmp_path):
    assert_refused(tmp_path / "none.nemo", tmp_path / "out", "no such file")
    (tmp_path / "text.nemo").write_text("hello " * 1000)
    assert_refused(tmp_path / "text.nemo", tmp_path / "out", "no tar archive")
    (tmp_path / "empty.nemo").write_bytes(b"")
    assert_refused(tmp_path / "empty.nemo", tmp_path / "out")
    other = write_tar(tmp_path / "other.nemo", [(member("readme.txt"), b"hello")])
    assert_refused(other, tmp_path / "out", "model_config.yaml")
    (tmp_path / "folder").mkdir()
    assert_refused(tmp_path / "folder", tmp_path / "out", "model_config.yaml")


@pytest.mark.parametrize(
    "text", [b"a: [1, 2", b"\xff\xfe\x00", b"- 1\n- 2\n", b"!!python/object/apply:os.getpid []\n"]
)
def test_unreadable_configurations_are_refused(tmp_path, text):
    path = write_tar(tmp_path / "m.nemo", [(member("model_config.yaml"), text)])
    with pytest.raises(CheckpointError, match="model_config.yaml"):
        archive.read_config(path)


def test_too_little_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    path = archive.write_archive(content(tmp_path / "source"), tmp_path / "model.nemo")
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(CheckpointError, match="bytes .* are free"):
        archive.extract(path, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, failing):
    target = archive.write_archive(content(tmp_path / "one"), tmp_path / "model.nemo")
    before = target.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(archive.os, failing, interrupted)
    with pytest.raises(KeyboardInterrupt):
        archive.write_archive(content(tmp_path / "two"), target)
    assert target.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.nemo", "one", "two"]


def test_the_target_is_complete_or_old_at_any_time(tmp_path, monkeypatch):
    target = archive.write_archive(content(tmp_path / "one"), tmp_path / "model.nemo")
    before, seen = target.read_bytes(), []
    add = tarfile.TarFile.add

    def watching(self, *args, **kwargs):
        add(self, *args, **kwargs)
        seen.append(target.read_bytes() == before)

    monkeypatch.setattr(tarfile.TarFile, "add", watching)
    archive.write_archive(content(tmp_path / "two"), target)
    assert seen and all(seen)
    assert target.read_bytes() != before
