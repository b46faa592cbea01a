# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""NeMo's exp_manager for runs that may have been killed at any moment."""

import shutil
from pathlib import Path

from lightning.pytorch import Trainer
from nemo.utils import logging
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig

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
    """Deletes checkpoints within `directory` whose writing did not end, then their marks."""
    suffix = NeMoModelCheckpoint.UNFINISHED_CHECKPOINT_SUFFIX
    for mark in sorted(directory.rglob(f"*{suffix}")):
        stem = mark.name.removesuffix(suffix)
        logging.warning(f"{mark.parent / stem}: was not written to its end; it is deleted.")
        for path in mark.parent.glob(f"{stem}*"):
            if path.name.removeprefix(stem) in ("", ".ckpt", ".nemo"):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        mark.unlink(missing_ok=True)
