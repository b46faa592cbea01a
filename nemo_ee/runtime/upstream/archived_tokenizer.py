# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Teaches NeMo's GPT classes the tokenizer inside a ``.nemo``: ``tokenizer.type: nemo:tokenizer``.

NeMo hands ``tokenizer.type`` to transformers before it has resolved what else an archive holds, and what it resolves
are single files; a folder cannot be named. Its `restore_from` imports the class in ``target`` before it builds
anything, though. Checkpoints of this package name a class in a module that calls `install`
(:mod:`nemo_ee.models.megatron_gpt_model` has NeMo's own), so that NeMo's connector and other NeMo classes restore them.
"""

import importlib
from collections.abc import Callable
from typing import Any

from nemo_ee.checkpoint import tokenizer
from nemo_ee.files.scratch import ScratchFolder
from nemo_ee.runtime.patching import NEMO, Patch

_MODULE = "nemo.collections.nlp.models.language_modeling.megatron_base_model"
_installed = False


def install() -> None:
    """Changes what `PATCHES` lists, once per process; models whose tokenizer is elsewhere do not notice."""
    global _installed
    if not _installed:
        importlib.import_module(_MODULE)
        for patch in PATCHES:
            patch.apply()
        _installed = True


def _build_from_archive(build: Callable[[Any], None]) -> Callable[[Any], None]:
    def build_tokenizer(self: Any) -> None:
        from nemo.utils.app_state import AppState

        if tokenizer.is_inside(self._cfg):
            app = AppState()
            name = app.model_restore_path if app.is_model_being_restored else None
            self._tokenizer_home = ScratchFolder("tokenizer")  # removed with the model
            tokenizer.resolve(self._cfg, app.nemo_file_folder, self._tokenizer_home.path, name)
        build(self)

    return build_tokenizer


def _write_with_tokenizer(write: Callable[[Any, str], None]) -> Callable[[Any, str], None]:
    def to_config_file(self: Any, path2yaml_file: str) -> None:
        write(self, path2yaml_file)
        home = getattr(self, "_tokenizer_home", None)
        if home is not None and str(self._cfg.tokenizer.get("type")).startswith(str(home.path)):
            tokenizer.pack(self._cfg.tokenizer, None, path2yaml_file)

    return to_config_file


PATCHES = (
    Patch(
        _MODULE,
        "MegatronBaseModel._build_tokenizer",
        NEMO,
        "takes tokenizer.type for a path or a hub's name, and nemo:tokenizer is neither",
        _build_from_archive,
    ),
    Patch(
        _MODULE,
        "MegatronBaseModel.to_config_file",
        NEMO,
        "would save the path of files that are deleted with the model, and not the files",
        _write_with_tokenizer,
    ),
)
