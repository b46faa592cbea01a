# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""One export from its settings: the folder appears in one step, or not at all."""

import re
from collections.abc import Callable
from pathlib import Path

from nemo_ee.errors import ConfigError, Fault
from nemo_ee.export.base import export_base
from nemo_ee.export.card import SIGNATURE
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
WRITTEN = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|README\.md|custom_generate/generate\.py|(.+/)?__pycache__/[^/]+|"
    r"(leaving|leaving_early|modeling_early_exit)\.py|[^./][^/]*\.(json|jinja|model|tiktoken|txt)"
)
"""Paths of what they write, tokenizers' files among it, and of what Python makes of their code."""


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
    if others := sorted(_others(output)):
        rule = f"holds {others[0]}, which is not of an export, and would be lost"
        raise ConfigError(Fault("output_path", output, rule, "name a folder that does not exist"))
    if not config.overwrite:
        raise ConfigError(Fault("output_path", output, "exists", "choose another or set overwrite=true"))


def _others(folder: Path) -> list[str]:
    """Files in a folder that are not of an export; all of them where no card says that it is one."""
    card = folder / "README.md"
    ours = card.is_file() and SIGNATURE in card.read_text(encoding="utf-8", errors="replace").lower()
    files = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = [path.relative_to(folder).as_posix() for path in files]
    return [name for name in names if not (ours and WRITTEN.fullmatch(name))]
