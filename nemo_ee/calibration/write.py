# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Writing a calibration's report."""

from functools import partial
from pathlib import Path

from nemo_ee.calibration.markdown import to_markdown
from nemo_ee.calibration.plots import plots
from nemo_ee.calibration.schema import CalibrationReport
from nemo_ee.files.output import write_text, write_with
from nemo_ee.report.serialise import to_json

REPORT = "calibration.json"
"""The numbers."""
PRICES = "prices.json"
"""The prices, which another calibration or decoding can read."""


def write_report(report: CalibrationReport, directory: str | Path) -> list[Path]:
    """Writes ``calibration.json``, the plots and ``calibration.md``, each in one step.

    Plots of exits that this report does not have are removed.

    Args:
        report: what was found.
        directory: created if missing.

    Returns:
        The files written.

    Raises:
        DataError: a number is not finite; nothing is written.
        OutputError: it cannot be written.
    """
    directory = Path(directory)
    written = [write_text(directory / REPORT, to_json(report, "calibration"))]
    drawn = plots(report)
    for old in (
        *directory.glob("reliability_exit_*.png"),
        *directory.glob("path_*.png"),
        directory / "frontier.png",
    ):
        if old.name not in drawn:
            old.unlink(missing_ok=True)
    for name, (_, draw) in drawn.items():
        written.append(write_with(directory / name, partial(draw().savefig, format="png")))
    images = {name: caption for name, (caption, _) in drawn.items()}
    return [*written, write_text(directory / "calibration.md", to_markdown(report, images))]
