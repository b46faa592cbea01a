# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Thresholds in a checkpoint's configuration; its weights and everything else are copied byte for byte."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf, open_dict

from nemo_ee.checkpoint import archive
from nemo_ee.errors import CheckpointError, ConfigError, Fault
from nemo_ee.files.output import work_folder


class ThresholdStore:
    """Copies a checkpoint with other thresholds.

    Args:
        source: a `.nemo` with exits: whole, or exits alone.
        output: the `.nemo` to write.
        others: files that `output` must not be, by the key that the user set.
        overwrite: replace `output` if it exists and is not `source`.

    Raises:
        ConfigError: `output` may not be written.
    """

    def __init__(self, source: str, output: str, others: dict[str, str], overwrite: bool):
        self.source, self.output = Path(source), Path(output)
        if self.output.is_dir():
            raise ConfigError(Fault("output_file", output, "is a directory", "name a .nemo file"))
        for key, other in others.items():
            if _same(self.output, Path(other)):
                rule = f"is {key}, which would be lost: only {source} is copied"
                raise ConfigError(Fault("output_file", output, rule, "choose another"))
        if self.output.exists() and not overwrite and not _same(self.output, self.source):
            remedy = "choose another, or set overwrite=true"
            raise ConfigError(Fault("output_file", output, "exists", remedy))
        check_folder("output_file", str(self.output.parent))
        self._stamp = _stamp(self.source)

    def write(self, thresholds: Sequence[float], exits: Sequence[int] | None) -> Path:
        """Writes `output` in one step: until it is complete, what was there before stays as it was.

        Args:
            thresholds: one per exit in use.
            exits: exits in use; None leaves them as they are in `source`.

        Returns:
            `output`.

        Raises:
            CheckpointError: `source` is damaged, or is no longer the file that it was.
            OutputError: it cannot be written.
        """
        with work_folder(self.output) as scratch:
            root = Path(scratch, "content")
            if self.source.is_dir():
                shutil.copytree(self.source, root)
            else:
                archive.extract(self.source, root)
            if _stamp(self.source) != self._stamp:
                raise CheckpointError(f"{self.source}: has changed since it was calibrated; calibrate again")
            config = archive.read_document(root, self.source)
            section = config.model if "model" in config else config
            with open_dict(section):
                OmegaConf.update(section, "early_exit.inference.threshold", list(thresholds), force_add=True)
                if exits is not None:
                    OmegaConf.update(section, "early_exit.inference.exits", list(exits), force_add=True)
            OmegaConf.save(config, root / archive.CONFIG_NAME)
            return archive.write_archive(root, self.output)


def check_folder(key: str, folder: str) -> None:
    """Whether files can be written to a folder that may not exist yet; creates nothing.

    Raises:
        ConfigError: they cannot.
    """
    nearest = Path(folder).absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        rule = f"{nearest} is no directory that can be written to"
        raise ConfigError(Fault(key, folder, rule, "choose another"))


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and os.path.samefile(one, other)


def _stamp(path: Path) -> tuple[int, int]:
    """Changes when a file is replaced or written to; of a directory, its configuration's."""
    status = (path / archive.CONFIG_NAME if path.is_dir() else path).stat()
    return status.st_size, status.st_mtime_ns
