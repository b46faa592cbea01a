# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Outputs: written whole or not at all, by one process at a time, and nothing of a dead one stays."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest
import torch

from nemo_ee.errors import CheckpointError, OutputError
from nemo_ee.files.output import claim, replaced_file, replaced_files, replaced_folder, work_folder
from nemo_ee.files.scratch import ScratchFolder
from tests.support.full_disk import file_limit
from tests.support.other_process import other_process

HOLD = """
    import sys
    from pathlib import Path
    from nemo_ee.errors import OutputError
    from nemo_ee.files.output import claim, replaced_file, replaced_folder, work_folder
    sys.stdin.readline()
    try:
        with globals()[sys.argv[1]](sys.argv[2]) as path:
            if sys.argv[1] != "claim":
                (path / "new" if path.is_dir() else path).write_text("new")
            print("holds", flush=True)
            sys.stdin.read()
    except OutputError as error:
        print(error, flush=True)
    """
KINDS = ("claim", "replaced_file", "replaced_folder", "work_folder")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def holder(kind: str, path: Path):
    process = other_process(HOLD, kind, path)
    return process


def begin(*processes) -> list[str]:
    """Has processes that are up go on all at once; what each says."""
    for process in processes:
        process.say("go")
    return [process.line() for process in processes]


def test_a_file_appears_whole_with_the_permissions_of_the_umask(tmp_path):
    target = tmp_path / "deep" / "er" / "out.txt"
    before = os.umask(0o027)
    try:
        with replaced_file(target) as part:
            part.write_text("new")
            assert not target.exists() and part.parent == target.parent
    finally:
        os.umask(before)
    assert target.read_text() == "new" and stat.S_IMODE(target.stat().st_mode) == 0o640
    assert names(target.parent) == ["out.txt"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "out.txt"
    target.write_text("old")
    with pytest.raises(KeyError), replaced_file(target) as part:
        part.write_text("new")
        raise KeyError
    assert target.read_text() == "old" and names(tmp_path) == ["out.txt"]


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    real, link = tmp_path / "disk" / "real.txt", tmp_path / "link.txt"
    real.write_text("old")
    link.symlink_to(real)
    with replaced_file(link) as part:
        assert part.parent == real.parent
        part.write_text("new")
    assert link.is_symlink() and real.read_text() == "new"
    dangling = tmp_path / "dangling.txt"
    dangling.symlink_to(tmp_path / "disk" / "other.txt")
    with replaced_file(dangling) as part:
        part.write_text("new")
    assert dangling.is_symlink() and (tmp_path / "disk" / "other.txt").read_text() == "new"
    with claim(link), other_process(HOLD, "claim", real) as other:
        assert "is writing it" in begin(other)[0]


def test_files_that_belong_together_appear_in_order_and_the_last_of_the_old_goes_first(tmp_path, monkeypatch):
    paths = [tmp_path / name for name in ("a.bin", "a.idx", "a.json")]
    for path in paths:
        path.write_text("old")
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(names(tmp_path)), replace(a, b)))
    with replaced_files(paths) as parts:
        for part in parts[:2]:
            part.write_text("new")
    kept = [[name for name in at if not name.startswith(".")] for at in seen]
    assert kept == [[], ["a.bin"]]
    assert [path.read_text() for path in paths[:2]] == ["new", "new"]
    assert names(tmp_path) == ["a.bin", "a.idx"]  # what is not written is not there
    with pytest.raises(KeyError), replaced_files(paths) as parts:
        parts[0].write_text("newer")
        raise KeyError
    assert paths[0].read_text() == "new" and names(tmp_path) == ["a.bin", "a.idx"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "out"
    for content in ("old", "new"):
        with replaced_folder(target) as part:
            (part / "sub").mkdir()
            (part / "sub" / content).write_text(content)
    assert names(target / "sub") == ["new"] and names(tmp_path) == ["out"]
    with pytest.raises(KeyError), replaced_folder(target) as part:
        (part / "newer").write_text("x")
        raise KeyError
    assert names(target / "sub") == ["new"] and names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", KINDS)
def test_of_processes_that_start_at_once_one_wins(kind, tmp_path):
    target = tmp_path / "out"
    with holder(kind, target) as a, holder(kind, target) as b, holder(kind, target) as c:
        said = begin(a, b, c)
        assert said.count("holds") == 1
        refused = [line for line in said if line != "holds"]
        assert all(
            line.startswith(f"{target}: ") and "is writing it; wait for its end" in line for line in refused
        )
        assert any("process " in line for line in refused)
        for process in (a, b, c):
            process.go_on()
            assert process.wait() == 0
    assert names(tmp_path) == ([] if kind in ("claim", "work_folder") else ["out"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("next_output", ["out", "other"])
def test_what_a_killed_process_left_goes_when_the_next_writes_there(kind, next_output, tmp_path):
    target = tmp_path / "out"
    if kind == "replaced_folder":
        target.mkdir()
        (target / "old").write_text("old")
    else:
        target.write_text("old")
    with holder(kind, target) as process:
        assert begin(process) == ["holds"]
        process.kill()
    assert len(names(tmp_path)) == (2 if kind == "claim" else 3)
    with claim(tmp_path / next_output):
        assert set(names(tmp_path)) == {"out", f".{next_output}.nemo_ee-lock"}
    assert names(tmp_path) == ["out"]
    assert (target / "old" if target.is_dir() else target).read_text() == "old"


def test_a_process_killed_while_folders_are_exchanged_has_lost_none(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    code = """
    import os, signal, sys
    from nemo_ee.files.output import replaced_folder
    rename = os.rename
    def killed_after_it(a, b):
        rename(a, b)
        os.kill(os.getpid(), signal.SIGKILL)
    os.rename = killed_after_it
    with replaced_folder(sys.argv[1]) as part:
        (part / "new").write_text("new")
    """
    with other_process(code, target) as process:
        assert process.wait() == -9
    assert not target.exists()
    with claim(tmp_path / "other"):
        assert names(target) == ["old"]
    assert names(tmp_path) == ["out"]


def test_what_a_live_process_writes_and_what_only_looks_like_it_stays(tmp_path):
    mine = [".notes.txt.part", "notes.nemo_ee-part", ".nemo_ee-part", ".notes.nemo_ee-parts"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    with holder("replaced_file", tmp_path / "live") as process:
        assert begin(process) == ["holds"]
        with claim(tmp_path / "other"):
            assert (tmp_path / ".live.nemo_ee-part").read_text() == "new"
        process.go_on()
        assert process.wait() == 0
    assert names(tmp_path) == sorted([*mine, "live"])


def test_what_another_user_was_killed_at_keeps_nobody_away(tmp_path, monkeypatch):
    """In a folder that several may write to: the lock of another may be read alone."""
    target = tmp_path / "out"
    (tmp_path / ".out.nemo_ee-lock").write_text("process 1 on a")
    (tmp_path / ".out.nemo_ee-part").write_text("half")
    opened = os.open

    def readable(path, flags, *mode):
        if str(path).endswith("nemo_ee-lock") and flags & os.O_RDWR and not flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", readable)
    monkeypatch.setattr(os, "geteuid", lambda: -1)  # nothing there is ours
    with replaced_file(target) as part:
        part.write_text("new")
        monkeypatch.undo()
        with other_process(HOLD, "claim", target) as other:
            assert "is writing it" in begin(other)[0]
    assert target.read_text() == "new" and names(tmp_path) == ["out"]


def test_nobody_is_refused_because_others_clean_up(tmp_path):
    code = """
    import sys
    from pathlib import Path
    from nemo_ee.files.output import replaced_file
    folder, mine = Path(sys.argv[1]), sys.argv[2]
    for i in range(150):
        (folder / f".{mine}.nemo_ee-lock").touch()  # as a dead process leaves it
        (folder / f".{mine}.nemo_ee-part").write_text("dead")
        with replaced_file(folder / mine) as part:
            part.write_text(str(i))
        assert (folder / mine).read_text() == str(i)
    print("done", flush=True)
    """
    with (
        other_process(code, tmp_path, "a") as a,
        other_process(code, tmp_path, "b") as b,
        other_process(code, tmp_path, "c") as c,
    ):
        assert [each.line() for each in (a, b, c)] == ["done"] * 3
    assert names(tmp_path) == ["a", "b", "c"]


def test_a_thread_may_claim_what_it_has_claimed_and_another_may_not(tmp_path):
    target, refused = tmp_path / "out", []

    def elsewhere():
        try:
            with claim(target):
                pass
        except OutputError as error:
            refused.append(str(error))

    with claim(target):
        with replaced_file(target) as part:
            part.write_text("new")
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        with other_process(HOLD, "claim", target) as other:  # the inner one has not let it go
            assert "is writing it" in begin(other)[0]
    assert len(refused) == 1 and "another thread" in refused[0]
    assert names(tmp_path) == ["out"]


def test_a_forked_child_has_no_part_in_the_claim(tmp_path):
    target = tmp_path / "out"
    with claim(target):
        if (child := os.fork()) == 0:
            status = 1
            other = ScratchFolder("other")  # its lock has the number that the claim's had
            try:
                with claim(target):
                    status = 2
            except OutputError:
                status = 0
            finally:
                other.close()
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        if (child := os.fork()) == 0:
            os._exit(0)
        os.waitpid(child, 0)
        with other_process(HOLD, "claim", target) as other:
            assert "is writing it" in begin(other)[0]
    with claim(target):
        pass


SAID = {
    errno.ENOSPC: "the disk is full; make room",
    errno.EDQUOT: "your disk quota is used up; delete files",
    errno.EFBIG: r"larger than a file may be here; raise the limit \(ulimit -f unlimited\)",
    errno.EROFS: "its file system is read-only; write elsewhere",
    errno.EACCES: "no permission to write there; write elsewhere",
    errno.EIO: "the disk failed; look into the system's log",
}


@pytest.mark.parametrize("number", SAID)
def test_what_keeps_it_from_being_written_is_said_with_what_to_do(number, tmp_path):
    for kind in (replaced_file, replaced_folder, work_folder):
        with (
            pytest.raises(OutputError, match=f"out: cannot be written: .*{SAID[number]}"),
            kind(tmp_path / "out") as part,
        ):
            raise OSError(number, os.strerror(number), str(part))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "raised",
    [
        RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        RuntimeError("basic_ios::clear: iostream error"),
        Exception("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_known_whichever_library_met_it(raised, tmp_path):
    with pytest.raises(OutputError, match="the disk is full"), replaced_file(tmp_path / "out"):
        raise raised
    with pytest.raises(OutputError, match="the disk is full"), replaced_file(tmp_path / "out"):
        try:
            raise OSError(errno.ENOSPC, "full")
        except OSError as error:
            raise ValueError("cannot save") from error


def test_what_pytorch_cannot_write_is_known_wherever_it_ends(tmp_path):
    values = {"weights": torch.ones(20), "rest": "x" * 99}
    torch.save(values, tmp_path / "whole")
    size = (tmp_path / "whole").stat().st_size
    for limit in range(0, size, 13):
        with pytest.raises(OutputError, match="cannot be written: "), file_limit(limit):
            with replaced_file(tmp_path / "out") as part:
                torch.save(values, part)
        assert names(tmp_path) == ["whole"], limit


def test_a_disk_that_fails_when_all_is_written_leaves_the_old(tmp_path, monkeypatch):
    """The kernel's error at the end names no file."""
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()

    def fails(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OutputError, match="file: cannot be written: the disk failed"):
        with replaced_file(tmp_path / "file") as part:
            part.write_text("new")
    with pytest.raises(OutputError, match="folder: cannot be written: the disk failed"):
        with replaced_folder(tmp_path / "folder") as part:
            (part / "new").touch()
    assert names(tmp_path) == ["file", "folder"] and names(tmp_path / "folder") == ["old"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES])
def test_folders_that_cannot_be_flushed_are_written_to(number, tmp_path, monkeypatch):
    """VirtualBox's shared folders say EINVAL; a folder that takes files and lists none cannot be opened."""
    flush = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with replaced_file(tmp_path / "file") as part:
        part.write_text("new")
    with replaced_folder(tmp_path / "folder") as part:
        (part / "new").touch()
    assert names(tmp_path) == ["file", "folder"] and names(tmp_path / "folder") == ["new"]


def test_errors_of_what_is_read_are_not_taken_for_errors_of_writing(tmp_path):
    with pytest.raises(FileNotFoundError), replaced_file(tmp_path / "out"):
        (tmp_path / "in").read_text()
    with pytest.raises(CheckpointError), replaced_file(tmp_path / "out"):
        raise CheckpointError("No space left on device")
    assert names(tmp_path) == []


def test_a_full_disk_while_writing(tmp_path):
    with pytest.raises(OutputError, match="the disk is full"), replaced_file(tmp_path / "out") as part:
        part.symlink_to("/dev/full")
        part.write_text("text")
    assert names(tmp_path) == []


def test_paths_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "fifo")
    cases = {
        tmp_path / "folder": "it is a folder; name a file in it",
        tmp_path / "file" / "out": "file is a file and no folder; choose another path",
        tmp_path / "file" / "deep" / "out": "file is a file and no folder; choose another path",
        tmp_path / ("x" * 300): "its name is too long; choose a shorter one",
        tmp_path / ("x" * 250): "its name is too long; choose a shorter one",
        tmp_path / "loop": "its links lead in a circle; choose another path",
        tmp_path / "fifo": "neither a file nor a folder; choose another path",
        Path("/dev/null"): "neither a file nor a folder; choose another path",
        "nul\0": "is no path",
        "\ud800": "is no path",
    }
    for path, said in cases.items():
        with pytest.raises(OutputError, match=said), replaced_file(path):
            pytest.fail("not reached")
    with pytest.raises(OutputError, match="it is a file; name a folder"), replaced_folder(tmp_path / "file"):
        pytest.fail("not reached")
    assert names(tmp_path) == ["fifo", "file", "folder", "loop"]
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_on_a_file_system_without_locks_the_file_is_the_lock(tmp_path, monkeypatch):
    def no_locks(descriptor, how):
        raise OSError(errno.ENOLCK, "no locks")

    target = tmp_path / "out"
    with holder("replaced_file", target) as process:
        assert begin(process) == ["holds"]
        monkeypatch.setattr("fcntl.flock", no_locks)
        with (
            pytest.raises(OutputError, match=r"or was killed .* delete .*\.out\.nemo_ee-lock"),
            claim(target),
        ):
            pytest.fail("not reached")
        with replaced_file(tmp_path / "other") as part:
            part.write_text("new")
        assert set(names(tmp_path)) == {".out.nemo_ee-lock", ".out.nemo_ee-part", "other"}
        process.kill()
    (tmp_path / ".out.nemo_ee-lock").unlink()
    with claim(target):
        pass
    assert names(tmp_path) == ["other"]
