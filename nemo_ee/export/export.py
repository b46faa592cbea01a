# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""One export from its settings: the folder appears in one step, or not at all."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from nemo_ee.errors import ConfigError, Fault
from nemo_ee.export.base import export_base
from nemo_ee.export.draft import export_draft
from nemo_ee.export.remote import export_remote
from nemo_ee.export.settings import ExportConfig
from nemo_ee.export.source import Source, opened
from nemo_ee.files.output import replaced_folder
from nemo_ee.files.write_errors import write_errors

WRITERS: dict[str, Callable[[ExportConfig, Source, Path], None]] = {
    "base": export_base,
    "draft": export_draft,
    "remote": export_remote,
}
"""Kind -> what writes it into an empty folder."""
_COMPILED = re.compile(r"(.+/)?__pycache__/[^/]+\.pyc")
_LIST = re.compile(r"<!-- written by nemo_ee: (\[.*\]) -->")
"""Behind every card: the files of the export. `overwrite` replaces nothing else."""


def export(config: ExportConfig) -> Path:
    """Writes a model as a Hugging Face folder. One process; no model is built.

    Returns:
        The folder.

    Raises:
        ConfigError, CheckpointError: what cannot be exported; before weights are read.
        OutputError: nothing can be written there.
    """
    output = Path(config.output_path)
    if output.exists():
        _check_overwriting(config, output)
    with replaced_folder(output) as part, opened(config) as source, write_errors(output, [part]):
        WRITERS[config.kind](config, source, part)
        with (part / "README.md").open("a", encoding="utf-8") as card:
            card.write(f"\n<!-- written by nemo_ee: {json.dumps(_files(part))} -->\n")
    return output


def _check_overwriting(config: ExportConfig, output: Path) -> None:
    """Raises ConfigError unless a folder may go: it was said so, all in it is of an export, and neither what is read
    nor who runs this is in it."""
    if not output.is_dir():
        raise ConfigError(Fault("output_path", output, "is a file", "name a folder that does not exist"))
    if Path.cwd().is_relative_to(output.resolve()):
        rule = "is the folder that this runs in, or holds it"
        raise ConfigError(Fault("output_path", output, rule, "set output_path=exported"))
    for key in ("gpt_model_file", "adapter_file", "report_file", "tokenizer"):
        given = getattr(config, key)
        if given is not None and Path(given).resolve().is_relative_to(output.resolve()):
            rule = f"{key}={given} lies in it, and would be removed with it"
            raise ConfigError(Fault("output_path", output, rule, "choose another"))
    if others := _others(output):
        rule = f"holds {others[0]}, which is not of an export, and would be lost"
        raise ConfigError(Fault("output_path", output, rule, "name a folder that does not exist"))
    if not config.overwrite:
        raise ConfigError(Fault("output_path", output, "exists", "choose another or set overwrite=true"))


def _others(folder: Path) -> list[str]:
    """Files in a folder that are not of an export; all of them where no card says that it is one."""
    card = folder / "README.md"
    found = _LIST.findall(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else []
    ours = set(json.loads(found[-1])) if found else set()
    return [name for name in _files(folder) if name not in ours and not _COMPILED.fullmatch(name)]


def _files(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in found)
