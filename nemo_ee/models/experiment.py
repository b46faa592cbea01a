# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""NeMo's exp_manager and fit for runs that may have been killed at any moment."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from nemo.utils import logging
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig

from nemo_ee.checkpoint import collective
from nemo_ee.errors import ConfigError, Fault

DEFAULT_DIRECTORY = "nemo_experiments"
"""NeMo's, where neither `explicit_log_dir` nor `exp_dir` is given."""


def start_experiment(trainer: Trainer, cfg: DictConfig) -> None:
    """Sets up logs, checkpoints and resuming, as `exp_manager` does.

    A run that is killed while it writes a checkpoint leaves it marked as unfinished. NeMo deletes such
    checkpoints when training starts, but refuses to get that far where there is no older one to resume from;
    here they are deleted first, and the run begins anew.

    Args:
        trainer: without logger and checkpoint callback of its own.
        cfg: the `exp_manager` section.
    """
    if cfg.get("resume_if_exists", False):
        directory = cfg.get("explicit_log_dir")
        if directory is None:
            directory = Path(cfg.get("exp_dir") or DEFAULT_DIRECTORY, cfg.get("name") or "default")
        remove_unfinished(Path(directory))
    exp_manager(trainer, cfg)


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
    """
    noted = _Started()
    trainer.callbacks.insert(0, noted)
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
    if collective.on_rank_zero(lambda: not path.exists()):
        model.save_to(str(path))
        logging.warning(f"{path}: was missing; it was written from the last checkpoint.")
