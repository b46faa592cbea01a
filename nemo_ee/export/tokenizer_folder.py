# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint's tokenizer as files for transformers, with which texts have the ids that they have here."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_ee.checkpoint import end_of_text
from nemo_ee.checkpoint.tokenizer import copy_files, tokenizer_files
from nemo_ee.data.token_rules import beginning, known_id, named_templates, tokens_before_a_text
from nemo_ee.data.tokenizer import TokenizerConfig, is_plain, load
from nemo_ee.errors import ConfigError, Fault


@dataclass(frozen=True)
class ExportedTokenizer:
    """A tokenizer that can be written.

    Attributes:
        live: of transformers.
        home: a folder with its files; None where there is none to copy.
        eos_ids: all tokens that end a text, its own EOS first.
        begins: what texts begin with here.
    """

    live: Any
    home: Path | None
    eos_ids: tuple[int, ...]
    begins: list[int]

    @property
    def rows(self) -> int:
        """One more than its largest id."""
        return max(self.live.get_vocab().values()) + 1

    def special_tokens(self) -> dict[str, Any]:
        """Ids for `config.json` and `generation_config.json`."""
        ends = list(self.eos_ids)
        return {
            "bos_token_id": known_id(self.live.bos_token_id),
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            "pad_token_id": known_id(self.live.pad_token_id),
        }

    def write(self, folder: Path) -> None:
        """Writes its files into a folder that exists."""
        begins = tokens_before_a_text(self.live) == self.begins
        if begins and self.home is not None:
            copy_files(self.home, folder)
        else:
            if not begins:
                _begin_with(self.live, self.begins)
            self.live.save_pretrained(folder)
        _fit(folder / "tokenizer_config.json")


@contextmanager
def exported_tokenizer(path: str, model: DictConfig, given: str | None) -> Iterator[ExportedTokenizer]:
    """The tokenizer of a checkpoint.

    Args:
        path: the `.nemo`.
        model: its `model` section.
        given: a folder with a tokenizer to take instead.

    Raises:
        ConfigError: it has no form that transformers reads.
        CheckpointError: it cannot be loaded.
    """
    section = model.get("tokenizer") or {}
    if given is not None and not Path(given).is_dir():
        rule, remedy = "is no folder", "name one that holds tokenizer.json and tokenizer_config.json"
        raise ConfigError(Fault("tokenizer", given, rule, remedy))
    wanted = TokenizerConfig(nemo=path) if given is None else TokenizerConfig(type=given)
    with tokenizer_files(wanted) as description:
        if description.library != "huggingface":
            rule = f"that of {path} is of the library {description.library}, which transformers does not read"
            remedy = "set tokenizer=FOLDER, a Hugging Face tokenizer with the same ids"
            raise ConfigError(Fault("tokenizer", given, rule, remedy))
        live = load(description)
        live = live if is_plain(description) else live.tokenizer
        home = Path(description.type or "")
        others = section.get(end_of_text.KEY) or ()
        own = known_id(live.eos_token_id)
        ends = tuple(dict.fromkeys([*([] if own is None else [own]), *others]))
        try:
            begins = beginning(
                tokens_before_a_text(live),
                known_id(live.bos_token_id),
                None if given else section.get("add_bos"),
            )
        except LookupError as error:
            rule = f"{error} ({path} says so)"
            raise ConfigError(
                Fault("tokenizer.add_bos", True, rule, "set tokenizer=FOLDER, one that has it")
            ) from error
        copyable = is_plain(description) and home.is_dir()
        template = None if given else _jinja(section, path)
        if template is not None:
            live.chat_template, copyable = template, False
        yield ExportedTokenizer(live, home if copyable else None, ends, begins)


def _jinja(section: Mapping, path: str) -> Any:
    """The chat template that a checkpoint's configuration has in place of its tokenizer's own; None without one."""
    template = section.get("chat_template")
    if not OmegaConf.is_config(template):
        return template
    plain = OmegaConf.to_container(template)
    if "roles" not in plain:
        return named_templates(plain)
    from nemo.utils import logging

    logging.warning(
        f"{path}: tokenizer.chat_template is of NeMo's form (prefix and roles), which transformers does not read: it "
        "is left out"
    )
    return None


def _fit(path: Path) -> None:
    """Takes out what names code, in this folder or in a repository elsewhere: who trusts the code of a model's folder
    has that run, too. Says what a Llama takes: without that `tokenizer(…)` gives token types, which `generate`
    refuses."""
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    settings.pop("auto_map", None)
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _begin_with(live: Any, ids: list[int]) -> None:
    """Has a tokenizer put these tokens before every text, or none."""
    from tokenizers.processors import TemplateProcessing

    if not live.is_fast:
        rule = "a slow tokenizer begins texts by code of its own, which a folder cannot change"
        remedy = "set tokenizer=FOLDER, a fast one (tokenizer.json)"
        raise ConfigError(Fault("tokenizer.add_bos", bool(ids), rule, remedy))
    names = live.convert_ids_to_tokens(ids)
    template = [*names, "$A"]
    live.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, pair=[*template, "$B"], special_tokens=list(zip(names, ids, strict=True))
    )
