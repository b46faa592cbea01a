# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Indices of samples that megatron-core keeps beside a dataset.

It takes them with `numpy.load(…, allow_pickle=True)`, which unpickles whatever is no array: who gives a dataset away
may have put a program there, under a name that follows from the dataset's path and settings that everybody uses.
"""

import os
from pathlib import Path

import numpy as np

from nemo_ee.errors import DataError


def cache_folder(prefix: str | os.PathLike) -> Path:
    """Where GPTDataset looks for the indices of a dataset, unless `index_mapping_dir` is set."""
    return Path(prefix, "cache", "GPTDataset_indices")


def check_index_cache(folder: str | os.PathLike) -> None:
    """Checks that what would be loaded from a folder are arrays of whole numbers.

    Args:
        folder: need not exist.

    Raises:
        DataError: naming a file that is none. The message does not say how to go on.
    """
    for file in sorted(Path(folder).glob("*.npy")):
        if file.is_file() and not _holds_numbers(file):
            raise DataError(f"{file} is no array of whole numbers, and would be unpickled")


def _holds_numbers(file: Path) -> bool:
    try:
        return np.lib.format.open_memmap(file, mode="r").dtype.kind in "iu"
    except Exception:  # a damaged header raises almost anything
        return False
