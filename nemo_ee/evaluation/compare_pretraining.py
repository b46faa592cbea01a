# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""From the directories of two pre-training runs to a report on disk."""

from functools import partial
from pathlib import Path

import torch

from nemo_ee.files.output import write_text, write_with
from nemo_ee.report import provenance
from nemo_ee.report.pretraining import compare, read_run, to_markdown
from nemo_ee.report.pretraining_plots import PLOTS


def write_comparison(with_exits: str | Path, plain: str | Path, output: str | Path) -> list[Path]:
    """Writes `report.md` and its plots.

    Args:
        with_exits: directory of the run that was trained with exits.
        plain: of the run with loss weights 0.
        output: created if missing.

    Returns:
        The files written.

    Raises:
        DataError, CheckpointError: a run has not ended, or the two do not compare; nothing is written.
        OutputError: it cannot be written.
    """
    comparison = compare(read_run(with_exits, "with_exits"), read_run(plain, "plain"))
    directory = Path(output)
    written = []
    for name, draw in PLOTS.items():
        written.append(write_with(directory / name, partial(draw(comparison).savefig, format="png")))
    about = {
        "device": f"{provenance.device()}, load average {provenance.load_average()}",
        "torch, precision": f"{torch.__version__}, {comparison.with_exits.config['precision']}",
        "commit": provenance.commit(),
        "date": provenance.date(),
        "command": f"`{provenance.command()}`",
    }
    return [*written, write_text(directory / "report.md", to_markdown(comparison, about))]
