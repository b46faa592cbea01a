# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints where the disk is full, where the process is killed, and where two write at once: the old one stays."""

import os
import re
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from nemo_ee.files.output import claim
from nemo_ee.files.scratch import scratch_folder
from tests.support import tiny_llama
from tests.support.distributed import WorkerError
from tests.support.full_disk import file_limit, small_disk

KINDS = ("convert", "edit", "exits", "merge", "thresholds", "whole")
MOMENTS = ("os.replace", "tarfile.TarFile.add")
"""Where a process is killed: all is written and not yet in its place; nothing of the archive is written."""


def write_inputs(folder: str) -> None:
    from nemo_ee.checkpoint.exits.adapter import merge

    model = model_with_exits(folder)
    model.save_adapters(f"{folder}/exits.nemo")
    merge(f"{folder}/base.nemo", f"{folder}/exits.nemo", f"{folder}/merged.nemo")


def model_with_exits(folder: str):
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel as Model
    from tests.support.tiny_gpt import tiny_model, tiny_model_config, tiny_trainer

    config = tiny_model_config([2, 4])
    early_exit = config.pop("early_exit")
    base = f"{folder}/base.nemo"
    if not os.path.exists(base):
        tiny_model(config).save_to(base)
    plain = Model.restore_from(base, return_config=True, trainer=tiny_trainer())
    return Model.restore_from(
        base, override_config_path=Model.add_exits(plain, early_exit), trainer=tiny_trainer()
    )


def writer(kind: str, folder: str):
    """What writes a checkpoint to the path that it is given; all that it reads has been read or lies in `folder`."""
    from nemo_ee.calibration.store import ThresholdStore
    from nemo_ee.checkpoint.conversion.convert import convert_to_nemo
    from nemo_ee.checkpoint.exits.adapter import merge
    from nemo_ee.models.exit_editor import edit_exits
    from tests.support.tiny_gpt import tiny_trainer

    if kind in ("exits", "whole"):
        model = model_with_exits(folder)
        return model.save_adapters if kind == "exits" else model.save_to
    merged = f"{folder}/merged.nemo"
    return {
        "convert": lambda path: convert_to_nemo(f"{folder}/hf", path, overwrite=True),
        "edit": lambda path: edit_exits(merged, path, [2], {}, tiny_trainer(), overwrite=True),
        "merge": lambda path: merge(f"{folder}/base.nemo", f"{folder}/exits.nemo", path, overwrite=True),
        "thresholds": lambda path: ThresholdStore(merged, path, {}, True).write((0.5, 0.5), None),
    }[kind]


def said_of(folder: str, kind: str, path: str, scratch: str, limit: int) -> str:
    """What is raised by writing a checkpoint."""
    os.environ["TMPDIR"], tempfile.tempdir = scratch, None
    write = writer(kind, folder)
    try:
        with file_limit(limit):
            write(path)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def write_and_die(folder: str, kind: str, path: str, moment: str, scratch: str) -> None:
    """Writes a checkpoint, and is killed when it comes to `moment`."""
    import importlib

    os.environ["TMPDIR"], tempfile.tempdir = scratch, None
    write = writer(kind, folder)
    module, _, name = moment.rpartition(".")
    place = importlib.import_module(module) if module == "os" else importlib.import_module("tarfile").TarFile
    setattr(place, name, lambda *args, **kwargs: os.kill(os.getpid(), 9))
    write(path)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, workers):
    folder = tmp_path_factory.mktemp("outputs")
    tiny_llama.write(folder / "hf")
    workers(1).run(write_inputs, str(folder))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def outputs_in(folder: Path) -> dict[str, str]:
    """A path for each kind; something old is there."""
    folder.mkdir(exist_ok=True)
    paths = {kind: str(folder / f"{kind}.nemo") for kind in KINDS}
    for path in paths.values():
        Path(path).write_bytes(b"old")
    return paths


def messages(
    workers, workspace: Path, paths: dict[str, str], scratch: Path, limit: int = -1
) -> dict[str, str]:
    """Kind -> what is said, each in a process of its own."""
    return {
        kind: workers(1).run(said_of, str(workspace), kind, path, str(scratch), limit)[0]
        for kind, path in paths.items()
    }


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """TMPDIR; nothing is left there of processes that have ended, once another has made a folder."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    with scratch_folder("next"):
        pass
    assert list(folder.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_what_was_there(workspace, workers, tmp_path, scratch):
    try:
        with small_disk(tmp_path / "small", 100) as folder:
            paths = outputs_in(folder)
            found = messages(workers, workspace, paths, scratch)
            assert content(folder) == {f"{kind}.nemo": b"old" for kind in KINDS}
    except PermissionError as error:
        pytest.skip(str(error))
    for kind, message in found.items():
        full = f"OutputError: {paths[kind]}: cannot be written: the disk is full; make room"
        soon = r"CheckpointError: .*/(base|merged)\.nemo: needs \d+ bytes in .* but \d+ are free; make room"
        assert message.startswith(full) or re.match(soon, message), message


@pytest.mark.slow
def test_a_file_that_may_not_grow_is_said_and_leaves_what_was_there(workspace, workers, tmp_path, scratch):
    paths = outputs_in(tmp_path / "out")
    for message in messages(workers, workspace, paths, scratch, 20_000).values():
        assert message.startswith("OutputError: ") and "cannot be written: it would be larger" in message, (
            message
        )
    assert content(tmp_path / "out") == {f"{kind}.nemo": b"old" for kind in KINDS}


def test_what_another_process_is_writing_is_refused(workspace, workers, tmp_path, scratch):
    paths = outputs_in(tmp_path / "out")
    with ExitStack() as claims:
        for path in paths.values():
            claims.enter_context(claim(path))
        found = messages(workers, workspace, paths, scratch)
    for kind, message in found.items():
        assert message.startswith(f"OutputError: {paths[kind]}: process {os.getpid()} on "), message
    assert content(tmp_path / "out") == {f"{kind}.nemo": b"old" for kind in KINDS}


OTHERS = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "merge"]


@pytest.mark.parametrize("kind", ["merge", *OTHERS])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_leaves_what_was_there_and_the_next_run_clears_the_rest(
    kind, moment, workspace, workers, tmp_path, scratch
):
    path = outputs_in(tmp_path / "out")[kind]
    with pytest.raises(WorkerError):
        workers(1).run(write_and_die, str(workspace), kind, path, moment, str(scratch))
    names = {f"{each}.nemo" for each in KINDS}
    assert Path(path).read_bytes() == b"old"
    assert {each.name for each in (tmp_path / "out").iterdir()} > names
    with claim(tmp_path / "out" / "another"):
        pass
    assert content(tmp_path / "out").keys() == names
