# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Writing a report's files."""

from functools import partial
from pathlib import Path

from nemo_ee.files.output import write_text, write_with
from nemo_ee.report.markdown import CAPTIONS, to_markdown
from nemo_ee.report.plots import PLOTS
from nemo_ee.report.sample_text import sample_figure, sample_html
from nemo_ee.report.schema import Report
from nemo_ee.report.serialise import to_json

REPORT = "report.json"
"""The numbers."""


def write_report(report: Report, directory: str | Path) -> list[Path]:
    """Writes ``report.json``, ``report.md``, the plots and ``sample_text.html``.

    Each file is replaced in one step, ``report.json`` first: the numbers are safe whatever happens to the
    plots. Plots of an earlier report that this one has no data for are removed.

    Args:
        report: the measurements.
        directory: created if missing.

    Returns:
        The files written.

    Raises:
        DataError: a number in the report is not finite; nothing is written.
        OutputError: it cannot be written.
    """
    directory = Path(directory)
    written = [write_text(directory / REPORT, to_json(report, "report"))]
    for name, draw in {**PLOTS, "sample_text.png": sample_figure}.items():
        figure = draw(report)
        if figure is None:
            (directory / name).unlink(missing_ok=True)
        else:
            written.append(write_with(directory / name, partial(figure.savefig, format="png")))
    if report.samples:
        written.append(write_text(directory / "sample_text.html", sample_html(report)))
    else:
        (directory / "sample_text.html").unlink(missing_ok=True)
    images = tuple(name for name in CAPTIONS if directory / name in written)
    written.append(write_text(directory / "report.md", to_markdown(report, images)))
    return written
