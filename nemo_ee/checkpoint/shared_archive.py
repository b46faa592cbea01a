# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Writing one ``.nemo`` file with all ranks: each writes weights, rank 0 packs, a failure reaches all."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from nemo_ee.checkpoint import archive
from nemo_ee.files.output import work_folder
from nemo_ee.files.write_errors import write_errors
from nemo_ee.runtime.collective import on_all_ranks, on_first_rank


def save_archive(
    path: str | os.PathLike, write_weights: Callable[[Path], None], write_rest: Callable[[Path], None]
) -> None:
    """Writes a ``.nemo`` file that replaces ``path`` in one step. Collective over the world.

    Args:
        path: the file; its folder must be visible to all ranks, and has room for the content twice.
        write_weights: called on every rank with the folder for the weights, which does not exist yet.
        write_rest: called on rank 0 with the archive's top folder: configuration, tokenizer and so on.

    Raises:
        OutputError: it cannot be written.
        Exception: whatever went wrong, on every rank; the old file, if any, is intact then.
    """
    path = Path(path).absolute()
    with ExitStack() as stack:  # of the first rank
        staging = Path(on_first_rank(lambda: str(stack.enter_context(work_folder(path)))))

        def write() -> None:
            with write_errors(path, [staging]):
                write_weights(staging / archive.WEIGHTS_DIRECTORY)

        def finish() -> None:
            with write_errors(path, [staging]):
                write_rest(staging)
                archive.write_archive(staging, path)

        on_all_ranks(write)
        on_first_rank(finish)
