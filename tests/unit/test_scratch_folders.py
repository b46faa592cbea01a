# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Temporary folders: none outlives its process for longer than until the next is made, and none goes before."""

import errno
import gc
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import pytest

from nemo_ee.errors import OutputError
from nemo_ee.files.scratch import ScratchFolder, scratch_folder
from tests.support.full_disk import file_limit
from tests.support.other_process import other_process

HOLD = """
    import sys
    from nemo_ee.files.scratch import ScratchFolder
    folder = ScratchFolder("held")
    (folder.path / "file").write_text("text")
    print(folder.path, flush=True)
    sys.stdin.read()
    """


@pytest.fixture(autouse=True)
def tmpdir_of_this_test(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_a_folder_lasts_as_long_as_its_body(tmp_path):
    with scratch_folder("restore") as folder:
        assert folder.parent == tmp_path and folder.name.startswith("nemo_ee_restore_")
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "a").mkdir()
        (folder / "a" / "file").write_text("text")
    with pytest.raises(KeyError), scratch_folder("restore") as folder:
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_lasts_as_long_as_the_object_that_holds_it(tmp_path):
    folder = ScratchFolder("tokenizer")
    assert folder.path.is_dir()
    del folder
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    folder = ScratchFolder("tokenizer")
    folder.close()
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_killed_process_goes_when_the_next_is_made_and_that_of_a_live_one_stays():
    with other_process(HOLD) as killed, other_process(HOLD) as alive:
        left, held = Path(killed.line()), Path(alive.line())
        killed.kill()
        assert (left / "file").exists()
        with scratch_folder("next"):
            assert not left.exists()
            assert (held / "file").exists()
        alive.go_on()
        assert alive.wait() == 0
        assert not held.exists()


@pytest.mark.parametrize(
    "start",
    [
        "os.fork() or time.sleep(60)",
        "subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL, close_fds=False)",
        "multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,)).start()",
    ],
)
def test_what_a_killed_process_has_started_does_not_hold_its_folder(start):
    code = f"""
    import multiprocessing, os, subprocess, sys, time
    from nemo_ee.files.scratch import ScratchFolder
    folder = ScratchFolder("held")
    os.setpgid(0, 0)
    {start}
    print(folder.path, flush=True)
    time.sleep(60)
    """
    with other_process(code) as process:
        left = Path(process.line())
        time.sleep(0.3)
        try:
            process.kill()
            with scratch_folder("next"):
                assert not left.exists()
        finally:
            os.killpg(process.number, 9)


def test_a_forked_child_neither_removes_nor_releases_its_parents_folder():
    folder = ScratchFolder("parent")
    if (child := os.fork()) == 0:
        folder.close()
        del folder
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.path.is_dir()
    with other_process(HOLD) as other:  # it would remove a folder that nobody holds
        other.line()
        assert folder.path.is_dir()
    folder.close()


def _make_and_keep(names) -> None:
    global _kept
    _kept = ScratchFolder("worker")
    names.put(str(_kept.path))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_folder_of_a_process_of_multiprocessing_goes_with_it(method):
    context = multiprocessing.get_context(method)
    names = context.SimpleQueue()
    process = context.Process(target=_make_and_keep, args=(names,))
    process.start()
    path = Path(names.get())
    process.join()
    assert process.exitcode == 0 and not path.exists()


def test_what_only_looks_like_one_stays(tmp_path):
    folders = [
        tmp_path / name for name in ("nemo_ee_data", "nemo_ee_tokenizer_k3j2h1g0", "nemo_ee_a.scratch")
    ]
    for folder in folders:
        folder.mkdir()
        (folder / "file").write_text("mine")
    (tmp_path / "nemo_ee_a_k3j2h1g0.scratch").symlink_to(folders[0])
    (tmp_path / "nemo_ee_b_k3j2h1g0.scratch").write_text("mine")
    with scratch_folder("next"):
        pass
    assert all((folder / "file").read_text() == "mine" for folder in folders)
    assert (tmp_path / "nemo_ee_a_k3j2h1g0.scratch").is_symlink()
    assert (tmp_path / "nemo_ee_b_k3j2h1g0.scratch").read_text() == "mine"


def test_processes_that_make_and_remove_folders_all_at_once_lose_none():
    code = """
    from nemo_ee.files.scratch import scratch_folder
    for i in range(200):
        with scratch_folder("busy") as folder:
            (folder / "file").write_text("text")
            assert (folder / "file").read_text() == "text"
    print("done", flush=True)
    """
    with other_process(code) as a, other_process(code) as b, other_process(code) as c:
        assert [each.line() for each in (a, b, c)] == ["done"] * 3


def test_a_full_disk_says_where_to_go(tmp_path):
    with pytest.raises(OutputError, match="the disk is full; set TMPDIR to a folder"):
        with scratch_folder("restore"), open("/dev/full", "w") as full:
            full.write("text")
    with pytest.raises(OutputError, match="larger than a file may be here; raise the limit"), file_limit(10):
        with scratch_folder("restore") as folder:
            (folder / "file").write_text("more than ten bytes")
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_is_no_full_disk_passes(tmp_path):
    with pytest.raises(FileNotFoundError), scratch_folder("restore") as folder:
        (folder / "not there").read_text()
    with pytest.raises(OSError, match="full output"), scratch_folder("restore"):
        raise OSError(errno.ENOSPC, "full output", str(tmp_path / "output"))


def test_a_file_system_without_locks_for_folders_keeps_what_it_cannot_judge(monkeypatch, tmp_path):
    def no_locks(descriptor, how):
        raise OSError(errno.EBADF, "NFS")

    with other_process(HOLD) as process:
        left = Path(process.line())
        process.kill()
    monkeypatch.setattr("fcntl.flock", no_locks)
    with scratch_folder("next") as folder:
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == [left]
