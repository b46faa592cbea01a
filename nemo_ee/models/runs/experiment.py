# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""NeMo's exp_manager and fit for runs that may have been killed at any moment."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from nemo.utils import AppState, logging
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig, OmegaConf

from nemo_ee.errors import CheckpointError, ConfigError, DataError, Fault, OutputError
from nemo_ee.files.claim import claim, sweep
from nemo_ee.files.write_errors import write_errors
from nemo_ee.models.runs.resumed_checkpoint import KEY, age, checkpoint_to_resume
from nemo_ee.models.runs.run_checkpoint import RunCheckpoint, StopOnSignal, ValidateAfterResuming
from nemo_ee.runtime import collective
from nemo_ee.runtime.missing_ranks import naming_missing_ranks

DEFAULT_DIRECTORY = "nemo_experiments"
"""NeMo's, where neither `explicit_log_dir` nor `exp_dir` is given."""


@contextmanager
def experiment(trainer: Trainer, cfg: DictConfig) -> Iterator[None]:
    """Sets up a run, which the body builds a model for and fits; its folder is no other run's until it ends.

    A run that is refused before its first step leaves no folder behind that was made for it.

    Args:
        trainer: without logger and checkpoint callback of its own.
        cfg: the `exp_manager` section.

    Raises:
        As `start_experiment`, and what the body raises.
        OutputError: another run is writing there, or nothing can be written there.
    """
    directory, first = _directory(cfg), trainer.global_rank == 0
    shared = cfg.get("resume_if_exists", False) or cfg.get("explicit_log_dir") is not None
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    there = {directory, *directory.iterdir()} if directory.is_dir() else set()
    # Without a claim this run would delete what another is writing. Else NeMo makes a folder for this run alone.
    with claim(directory) if shared and first else nullcontext():
        log_dir = directory if shared else None
        try:
            log_dir = start_experiment(trainer, cfg)
            yield
        except (CheckpointError, ConfigError, DataError, OutputError):
            started = any(isinstance(each, _Started) and each.started for each in trainer.callbacks)
            if first and not started and log_dir is not None and log_dir not in there:
                shutil.rmtree(log_dir, ignore_errors=True)
                with suppress(OSError):
                    for path in new:
                        if path.exists():
                            path.rmdir()
            raise


def start_experiment(trainer: Trainer, cfg: DictConfig) -> Path:
    """Sets up logs, checkpoints and resuming, as `exp_manager` does.

    A run that is killed while it writes a checkpoint leaves it marked as unfinished. NeMo deletes such
    checkpoints when training starts, but refuses to get that far where there is no older one to resume from;
    here they are deleted first, and the run begins anew. Checkpoints are `RunCheckpoint`'s.

    Args:
        trainer: without logger and checkpoint callback of its own.
        cfg: the `exp_manager` section.

    Returns:
        The folder of this run's logs.

    Raises:
        ConfigError: a time or a number of steps that is none.
        CheckpointError: the last checkpoint is damaged; see `checkpoint_to_resume`.
        OutputError: nothing can be written there.
    """
    settings = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    every = (settings.get("checkpoint_callback_params") or {}).pop("every_n_train_steps", None)
    fallback = settings.pop("resume_fallback", False)
    if faults := list(_faults(settings, every, fallback)):
        raise ConfigError(*faults)
    other, resumes = None, cfg.get("resume_if_exists", False)
    directory = _directory(cfg)
    if trainer.global_rank == 0:
        sweep(directory / "checkpoints")  # half a .nemo would be taken for a checkpoint
    if resumes:
        remove_unfinished(directory)
        remove_superseded(directory)
        if (other := checkpoint_to_resume(directory, fallback)) is not None:
            settings.resume_from_checkpoint = str(other)
    stops = settings.get("create_preemption_callback", True)
    settings.create_preemption_callback = False
    with write_errors(directory):
        log_dir = exp_manager(trainer, settings)
    trainer.callbacks.append(ValidateAfterResuming())
    for index, callback in enumerate(trainer.callbacks):
        if type(callback) is NeMoModelCheckpoint:
            params = {**AppState().checkpoint_callback_params, "every_n_train_steps": every}
            checkpoint = RunCheckpoint(n_resume=resumes, **params)
            checkpoint.last_model_path = _with_ending(trainer.ckpt_path if other is None else None)
            trainer.callbacks[index] = checkpoint
            if stops:
                trainer.callbacks.append(StopOnSignal(checkpoint))
            break
    return Path(log_dir)


def _directory(cfg: DictConfig) -> Path:
    """Where NeMo has a run's logs and checkpoints, or a folder of them for each start."""
    if cfg.get("explicit_log_dir") is not None:
        return Path(cfg.explicit_log_dir)
    return Path(cfg.get("exp_dir") or DEFAULT_DIRECTORY, cfg.get("name") or "default")


def _faults(settings: DictConfig, every: object, fallback: object) -> Iterator[Fault]:
    if not isinstance(fallback, bool):
        yield Fault(
            KEY,
            fallback,
            "must be true or false",
            "write true to go on from the checkpoint before a damaged one",
        )
    limit = settings.get("max_time_per_run")
    if limit is not None and not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", str(limit)):
        rule = "must be a time as days:hours:minutes:seconds"
        yield Fault("exp_manager.max_time_per_run", limit, rule, "write e.g. 00:03:50:00")
    if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 0):
        key = "exp_manager.checkpoint_callback_params.every_n_train_steps"
        yield Fault(key, every, "must be a number of steps", "use 1 or more, or null")


def _with_ending(checkpoint: str | None) -> str:
    """How Lightning, which removes it once there is a newer one, names the checkpoint resumed from."""
    ending = NeMoModelCheckpoint.FILE_EXTENSION
    return f"{checkpoint}".removesuffix(ending) + ending if checkpoint else ""


def remove_unfinished(directory: Path) -> None:
    """Deletes checkpoints within `directory` whose writing did not end, then their marks.

    Every rank does it, before there are process groups to wait in: what another rank has deleted meanwhile is
    no error, and no rank sees a checkpoint without its mark.
    """
    for mark in _marks(directory):
        checkpoint = mark.with_name(mark.name.removesuffix(NeMoModelCheckpoint.UNFINISHED_CHECKPOINT_SUFFIX))
        logging.warning(f"{checkpoint}: was not written to its end; it is deleted.")
        for ending in ("", ".ckpt", ".nemo"):
            path = checkpoint.with_name(checkpoint.name + ending)
            if path.is_dir():
                shutil.rmtree(path, onerror=_unless_gone)
            else:
                path.unlink(missing_ok=True)
        mark.unlink(missing_ok=True)


def remove_superseded(directory: Path) -> None:
    """Deletes all but the newest of the last checkpoints within `directory`: killed between writing one and
    deleting the one before, a run leaves both, and NeMo would not know which to resume from.

    Every rank does it, as `remove_unfinished`.
    """
    last: dict[Path, list[Path]] = {}
    for folder, folders, files in os.walk(directory):
        for name in folders + files:
            if name.endswith(("-last", "-last.ckpt")):
                last.setdefault(Path(folder), []).append(Path(folder, name))
    for checkpoints in last.values():
        for old in sorted(checkpoints, key=age)[:-1]:
            logging.warning(f"{old}: there is a newer one; it is deleted.")
            NeMoModelCheckpoint.format_checkpoint_unfinished_marker_path(old).touch()
    remove_unfinished(directory)


def _marks(directory: Path) -> Iterator[Path]:
    for folder, _, files in os.walk(directory):  # which skips folders that vanish
        for name in sorted(files):
            if name.endswith(NeMoModelCheckpoint.UNFINISHED_CHECKPOINT_SUFFIX):
                yield Path(folder, name)


def _unless_gone(_function: Any, _path: str, raised: tuple) -> None:
    if not isinstance(raised[1], FileNotFoundError):
        raise raised[1]


class _Started(Callback):
    """Notes whether training began."""

    started = False

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.started = True


def fit(trainer: Trainer, model: Any) -> None:
    """`Trainer.fit`; a run that had reached its last step before still gets its `.nemo`, and says so.

    Lightning returns at once where an earlier start did all steps, so NeMo would not write the `.nemo` that
    a kill after the last checkpoint, or a user, took away. Collective over the world.

    Raises:
        ConfigError: no step was made, by this start or an earlier one.
        RankMissingError: other ranks do not answer.
        OutputError: logs or checkpoints cannot be written.
    """
    noted = _Started()
    trainer.callbacks.insert(0, noted)
    with naming_missing_ranks(getattr(trainer.strategy.launcher, "procs", ())):
        trainer.ckpt_path = collective.on_first_rank(lambda: trainer.ckpt_path)
        with write_errors(trainer.log_dir or DEFAULT_DIRECTORY):
            trainer.fit(model)
    if noted.started:
        return
    if trainer.global_step == 0:
        rule = "not one training step was made"
        remedy = "set it to 1 or more, and trainer.limit_train_batches too"
        raise ConfigError(Fault("trainer.max_steps", trainer.max_steps, rule, remedy))
    logging.warning(
        f"{trainer.log_dir}: an earlier start did all {trainer.global_step} steps; nothing was trained now. "
        "To train with other settings give another name=…, or delete this directory."
    )
    callback = trainer.checkpoint_callback
    if not getattr(callback, "save_nemo_on_train_end", False):
        return
    path = Path(callback._format_nemo_checkpoint_name())
    if collective.on_first_rank(lambda: not path.exists()):
        model.save_to(str(path))
        logging.warning(f"{path}: was missing; it was written from the last checkpoint.")
