# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What a model card says was measured: figures of an evaluation of the same model, or that there are none."""

import dataclasses
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from nemo_ee.errors import ConfigError, Fault, first_line
from nemo_ee.export.settings import ExportConfig
from nemo_ee.export.source import Source
from nemo_ee.report.markdown import about, generation, held_out_text
from nemo_ee.report.schema import VERSION, Report

_NOTHING = """## Measured

Nothing of this folder: its writer runs no model. nemo_ee's tests hold {held}, and docs/export.md there says what was
measured with SmolLM2-135M.{engines}
"""
_FIGURES = """## Measured

By nemo_ee's `evaluate`, in nemo_ee, before this folder was written: its writer runs no model. The same exits say the
same in other engines, but times are others there.{engines}

"""
AGAIN = "evaluate again (python scripts/evaluate_early_exit.py), or leave it out"
NOT_RUN = " Neither vLLM nor SGLang was run: the form of what they read was compared with their sources."


def read_measured(config: ExportConfig, source: Source) -> Report | None:
    """The evaluation that a card shows; None where none is given.

    Raises:
        ConfigError: it is no report of an evaluation, or one of another model or of other exits.
    """
    if config.report_file is None:
        return None
    path = Path(config.report_file)
    try:
        report = TypeAdapter(Report).validate_json(path.read_bytes())
    except OSError as error:
        rule, remedy = f"cannot be read ({error.strerror})", "give a report.json that evaluating wrote"
        raise ConfigError(Fault("report_file", path, rule, remedy)) from error
    except (ValidationError, AssertionError) as error:
        rule = f"is no report.json of this version ({first_line(error)})"
        raise ConfigError(Fault("report_file", path, rule, AGAIN)) from error
    if report.version != VERSION:
        rule = f"is of version {report.version}, and this is {VERSION}"
        raise ConfigError(Fault("report_file", path, rule, AGAIN))
    is_of = (report.metadata.model, report.metadata.adapter, [each.layer for each in report.exits])
    wanted = (source.name, config.adapter_file and source.exits_name, list(source.early_exit.layers))
    if is_of != wanted:
        rule = "is of {} with {} and exits {}".format(
            *is_of
        ) + ", and this is {} with {} and exits {}".format(*wanted)
        raise ConfigError(Fault("report_file", path, rule, AGAIN))
    return report


def measured(report: Report | None, held: str, layer: int | None = None, engines: str = "") -> str:
    """A card's section.

    Args:
        report: of the model; None where there is none.
        held: what the tests hold.
        layer: of the exit that a folder has; None for all.
        engines: what was not run, if a card names such.
    """
    if report is None:
        return _NOTHING.format(held=held, engines=engines)
    sections = [about(report)]
    if layer is not None:
        only = [
            tuple(e for e in part if e.layer == layer) for part in (report.exits, report.exits_on_own_text)
        ]
        report = dataclasses.replace(report, exits=only[0], exits_on_own_text=only[1], thresholds=())
    sections.append(held_out_text(report))
    if report.thresholds:
        sections.append(generation(report))
    return _FIGURES.format(engines=engines) + "\n\n".join(sections).replace("\n## ", "\n### ") + "\n"
