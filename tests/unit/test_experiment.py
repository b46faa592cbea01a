# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What a killed run leaves behind is removed, by as many ranks at a time as there are."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from nemo_ee.errors import DataError, OutputError
from nemo_ee.models.runs import experiment as module
from nemo_ee.models.runs.experiment import remove_superseded, remove_unfinished
from nemo_ee.models.runs.run_checkpoint import RunCheckpoint


def torn(folder: Path, count: int) -> None:
    """Checkpoints of three kinds, all marked as unfinished."""
    for n in range(count):
        path = folder / f"run_{n % 3}" / f"model--step={n}[x]"
        if n % 2:
            (path / "part" / "deeper").mkdir(parents=True)
            for name in ("a", "b", "part/c", "part/deeper/d"):
                (path / name).write_text("torn")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            Path(f"{path}.ckpt").write_text("torn")
        Path(f"{path}-unfinished").touch()


def test_ranks_do_not_disturb_each_other(tmp_path):
    torn(tmp_path, 300)
    with ThreadPoolExecutor(8) as ranks:
        list(ranks.map(remove_unfinished, [tmp_path] * 8))  # raises what a rank raised
    assert [path for path in tmp_path.rglob("*") if path.parent != tmp_path] == []


def test_finished_checkpoints_stay(tmp_path):
    torn(tmp_path, 2)
    kept = tmp_path / "run_0" / "model--step=0[x]-last"
    kept.mkdir()
    remove_unfinished(tmp_path)
    assert kept.is_dir() and not list(tmp_path.rglob("*-unfinished"))


def test_what_cannot_be_deleted_keeps_its_mark(tmp_path, monkeypatch):
    torn(tmp_path, 2)

    def refused(path, onerror):
        onerror(None, path, (PermissionError, PermissionError(path), None))

    monkeypatch.setattr("shutil.rmtree", refused)
    with pytest.raises(PermissionError):
        remove_unfinished(tmp_path)
    assert (tmp_path / "run_1" / "model--step=1[x]-unfinished").exists()


def test_of_two_last_checkpoints_the_newer_stays(tmp_path):
    """Killed between writing one and deleting the one before: NeMo would refuse to choose."""
    names = [f"run--val_loss=0.1-step={step}-consumed_samples={4.0 * step}" for step in (9, 10)]
    for name in (*names, f"{names[0]}-last", f"{names[1]}-last"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "weights").write_text("whole")
    with ThreadPoolExecutor(8) as ranks:
        list(ranks.map(remove_superseded, [tmp_path] * 8))
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == sorted([*names, f"{names[1]}-last"]), "the best ones are not touched"


@pytest.mark.parametrize(
    ("previous", "goes"),
    [
        ("run/checkpoints/m--step=1.ckpt", True),
        ("run/checkpoints/../../precious", False),
        ("precious", False),
        ("s3://bucket/precious", False),
    ],
)
def test_a_run_deletes_within_its_own_folder_alone(tmp_path, monkeypatch, previous, goes):
    """Whatever the state of the checkpoint that it goes on from calls a checkpoint of its own."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    checkpoint = RunCheckpoint(dirpath=str(folder), save_top_k=1, monitor="loss")
    trainer = SimpleNamespace(ckpt_path=None)
    assert checkpoint._should_remove_checkpoint(trainer, previous, str(folder / "new.ckpt")) is goes


class TestRefused:
    """A run that is refused leaves no folder that was made for it, and takes none that was there."""

    @staticmethod
    def refused(
        monkeypatch, log_dir: Path, error: Exception, started: bool = False, **settings: object
    ) -> None:
        def exp_manager(trainer, _):
            log_dir.mkdir(parents=True, exist_ok=True)
            (log_dir / "nemo_log.txt").touch()
            return log_dir

        monkeypatch.setattr(module, "exp_manager", exp_manager)
        trainer = SimpleNamespace(global_rank=0, callbacks=[], ckpt_path=None)
        with pytest.raises(type(error)), module.experiment(trainer, OmegaConf.create(settings)):
            assert (log_dir / "nemo_log.txt").exists()
            noted = module._Started()
            noted.started = started
            trainer.callbacks.append(noted)
            raise error

    def test_a_new_folder_goes_with_those_above_it(self, tmp_path, monkeypatch):
        run = tmp_path / "a" / "b" / "run"
        self.refused(monkeypatch, run, DataError("x"), explicit_log_dir=str(run))
        assert not list(tmp_path.iterdir())
        for resumes, log_dir in ((True, run), (False, run / "version_0")):
            place = dict(exp_dir=str(run.parent), name="run", resume_if_exists=resumes)
            self.refused(monkeypatch, log_dir, DataError("x"), **place)
            assert not list(tmp_path.iterdir())

    def test_on_a_full_disk_it_is_named_and_gone(self, tmp_path, monkeypatch):
        def exp_manager(*_):
            run.mkdir()
            (run / "cmd-args.log").touch()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        run = tmp_path / "run"
        monkeypatch.setattr(module, "exp_manager", exp_manager)
        trainer = SimpleNamespace(global_rank=0, callbacks=[], ckpt_path=None)
        settings = OmegaConf.create({"explicit_log_dir": str(run)})
        with (
            pytest.raises(OutputError, match=f"^{run}: cannot be written: the disk is full"),
            module.experiment(trainer, settings),
        ):
            pytest.fail("not reached")
        assert not list(tmp_path.iterdir())

    def test_what_was_there_stays(self, tmp_path, monkeypatch):
        run = tmp_path / "run"
        (run / "version_0").mkdir(parents=True)
        self.refused(monkeypatch, run, DataError("x"), explicit_log_dir=str(run))
        place = dict(exp_dir=str(tmp_path), name="run")
        self.refused(monkeypatch, run / "version_1", DataError("x"), **place)
        assert sorted(path.name for path in run.iterdir()) == ["nemo_log.txt", "version_0"]

    @pytest.mark.parametrize("started, error", [(True, DataError("x")), (False, ZeroDivisionError())])
    def test_logs_of_what_began_or_failed_otherwise_stay(self, started, error, tmp_path, monkeypatch):
        run = tmp_path / "run"
        self.refused(monkeypatch, run, error, started, explicit_log_dir=str(run))
        assert [path.name for path in tmp_path.rglob("*")] == ["run", "nemo_log.txt"]
