# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The model at full depth: a plain Llama, Mistral or Qwen2."""

from pathlib import Path

from nemo_ee.export.card import base_card
from nemo_ee.export.folder import dtype_of, write_model
from nemo_ee.export.plain_llama import architecture_of, hugging_face_config
from nemo_ee.export.settings import ExportConfig
from nemo_ee.export.source import Source


def export_base(config: ExportConfig, source: Source, folder: Path) -> None:
    """Writes the base into a folder.

    Args:
        config: the settings.
        source: what is exported.
        folder: empty.

    Raises:
        CheckpointError: tensors that are missing, or that have no place in a plain model; weights that are no numbers.
        ConfigError: the architecture does not fit.
    """
    architecture = architecture_of(source.model, config.architecture)
    weights = source.weights().plain()
    dtype = dtype_of(weights, config.precision)
    settings = hugging_face_config(
        source.model, architecture, source.rows, dtype, **source.tokenizer.special_tokens()
    )
    write_model(folder, settings, weights, source.tokenizer, config.max_shard_size)
    (folder / "README.md").write_text(base_card(config, source, settings), encoding="utf-8")
