# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which checkpoint a run goes on from, and what it does where that one is damaged."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from nemo.utils import logging
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint
from nemo.utils.get_rank import is_global_rank_zero
from omegaconf import DictConfig

from nemo_ee.checkpoint.torch_dist import TorchDistCheckpoint
from nemo_ee.errors import CheckpointError, ConfigError, Fault

KEY = "exp_manager.resume_fallback"
ASIDE = "damaged_checkpoints"
"""In a run's folder: checkpoints that it did not go on from."""


def checkpoint_to_resume(directory: Path, fallback: bool) -> Path | None:
    """Looks at the last checkpoint of a run before anything is built.

    Every rank looks, before there are process groups to wait in, and so all fail alike; rank 0's choice is what counts
    (`fit`). It also moves what is damaged aside, so that no later start takes it for the last one.

    Args:
        directory: of the run.
        fallback: go on from the newest other checkpoint where the last one is damaged.

    Returns:
        That other checkpoint; None where NeMo's choice, the last one, is right, or there is none.

    Raises:
        CheckpointError: the last one is damaged; it says what to do to go on from which.
    """
    for last in _last_checkpoints(directory):
        try:
            _check(last)
        except FileNotFoundError:
            continue  # rank 0 has moved it
        except CheckpointError as error:
            other = next(_others(last), None)
            damage = str(error).rpartition("; ")[0]
            if other is None:
                raise CheckpointError(
                    f"{damage}; there is no other checkpoint to go on from: delete {last} to begin anew"
                ) from error
            if not fallback:
                raise CheckpointError(
                    f"{damage}; add {KEY}=true to go on from {other.name} (step {age(other)[0]}), or delete "
                    f"{last.parent} to begin anew"
                ) from error
            logging.warning(f"{damage}; the run goes on from {other} (step {age(other)[0]}).")
            if is_global_rank_zero():
                _move_aside(last)
            return other
    return None


def age(checkpoint: Path) -> tuple[int, str]:
    """Orders checkpoints by the step that their names tell."""
    steps = re.findall(r"(?:^|-)step=(\d+)", checkpoint.name)
    return (int(steps[0]) if steps else -1, checkpoint.name)


def _last_checkpoints(directory: Path) -> Iterator[Path]:
    for folder, folders, _ in os.walk(directory):
        folders[:] = [name for name in folders if name != ASIDE]
        for name in [name for name in folders if name.endswith("-last")]:
            folders.remove(name)
            yield Path(folder, name)


def _others(last: Path) -> Iterator[Path]:
    """Complete checkpoints beside the last one, the newest first."""
    beside = [path for path in last.parent.iterdir() if path.is_dir() and path != last and age(path)[0] >= 0]
    for path in sorted(beside, key=age, reverse=True):
        try:
            if not NeMoModelCheckpoint.is_checkpoint_unfinished(path):
                _check(path)
                yield path
        except (CheckpointError, FileNotFoundError):
            continue


def _check(path: Path) -> None:
    """Raises CheckpointError for a damaged one, FileNotFoundError for one that is gone."""
    try:
        TorchDistCheckpoint(path).check_stored_sizes()
    except CheckpointError:
        path.stat()
        raise


def _move_aside(path: Path) -> None:
    place = path.parent.parent / ASIDE / path.name
    place.parent.mkdir(exist_ok=True)
    number = 0
    while place.exists():
        number += 1
        place = place.with_name(f"{path.name}.{number}")
    path.rename(place)
    logging.warning(f"{path}: was moved to {place}; delete it if nothing can be learnt from it.")


def checkpoint_to_start_from(cfg: DictConfig) -> str | None:
    """The checkpoint that `restore_from_ckpt` names: itself, or of a run's directory the last one.

    Raises:
        ConfigError: there are two things to start from, or no such checkpoint.
    """
    path, ckpt = cfg.get("restore_from_path"), cfg.get("restore_from_ckpt")
    if ckpt is None:
        return None
    key = "model.restore_from_ckpt"
    if path:
        rule = f"model.restore_from_path={path} is given too, and a run starts from one of them"
        raise ConfigError(Fault(key, ckpt, rule, f"leave one away, e.g. {key}=null"))
    if str(ckpt).endswith(".nemo"):
        rule = "is a .nemo, which has weights but no optimizer's state"
        raise ConfigError(Fault(key, ckpt, rule, f"use {key}=null model.restore_from_path={ckpt}"))
    places = (Path(ckpt), *Path(ckpt).glob("*-last"), *Path(ckpt).glob("checkpoints/*-last"))
    found = [place for place in places if (place / "metadata.json").is_file()]
    if not found:
        rule = "has no checkpoint of a training run" if Path(ckpt).is_dir() else "no such directory"
        remedy = (
            "give a run's directory, whose last checkpoint is taken, or quote a checkpoint's name, which has =: "
            f"\"{key}='…/checkpoints/NAME-last'\""
        )
        raise ConfigError(Fault(key, ckpt, rule, remedy))
    return str(found[0])
