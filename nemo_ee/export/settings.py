# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The settings of an export, read once from `conf/export_hf.yaml` and its overrides."""

import re
from dataclasses import dataclass
from typing import Annotated

from nemo_ee.errors import Fault
from nemo_ee.schema import Settings, choice, holds

KINDS = ("base", "draft", "remote")
ARCHITECTURES = ("llama", "mistral", "qwen2")
ENGINES = ("transformers", "vllm", "llama.cpp", "sglang")
PRECISIONS = ("32", "bf16", "16")


def _known_engines(key: str, value: tuple[str, ...]) -> list[Fault]:
    rule, remedy = f"must be of {', '.join(ENGINES)}", f"write e.g. {key}=[transformers,vllm]"
    return [] if value and set(value) <= set(ENGINES) else [Fault(key, list(value), rule, remedy)]


_named = holds(lambda path: bool(path.strip()), "is empty", "name a file, or leave the key out")
_folder = holds(lambda path: bool(path.strip()), "is empty", "set output_path=exported")
_size = holds(
    lambda size: re.fullmatch(r"[1-9]\d*(KB|MB|GB)", size) is not None,
    "must be a whole number with KB, MB or GB",
    "set max_shard_size=5GB",
)


@dataclass(frozen=True)
class ExportConfig(Settings):
    """One export.

    Attributes:
        kind: `base`, the model at full depth; `draft`, one exit as a model of its own; `remote`, the model with all
            its exits and the code that runs them.
        gpt_model_file: the base, or a model merged with its exits, a `.nemo`.
        adapter_file: the exits alone; null if they are part of the model.
        output_path: the folder to write.
        layer: the exit of a draft; null where there is one alone.
        engines: that a draft shall run in; what one of them would compute wrongly is refused.
        architecture: class of the base: `llama`, `mistral` or `qwen2`; null takes the one that fits.
        precision: dtype of the weights: 32, bf16 or 16; null as they are saved.
        max_shard_size: of one file of weights, e.g. `5GB`.
        report_file: `report.json` of an evaluation of the same files, for the model card.
        tokenizer: a Hugging Face tokenizer's folder, for checkpoints whose own has no such form; null for their own.
        overwrite: replace `output_path` if it exists and holds nothing but an export.
    """

    kind: Annotated[str, choice(*KINDS)]
    gpt_model_file: Annotated[str, _named]
    output_path: Annotated[str, _folder]
    adapter_file: Annotated[str | None, _named] = None
    layer: int | None = None
    engines: Annotated[tuple[str, ...], _known_engines] = ("transformers", "vllm", "llama.cpp")
    architecture: Annotated[str | None, choice(*ARCHITECTURES)] = None
    precision: str | int | None = None
    max_shard_size: Annotated[str, _size] = "5GB"
    report_file: Annotated[str | None, _named] = None
    tokenizer: Annotated[str | None, _named] = None
    overwrite: bool = False

    def faults(self) -> list[Fault]:
        """See `Settings`."""
        faults = []
        if self.precision is not None and str(self.precision) not in PRECISIONS:
            rule = f"must be one of {', '.join(PRECISIONS)}, or null for that of the checkpoint"
            faults.append(Fault("precision", self.precision, rule, "set precision=bf16"))
        usual = type(self).engines
        for key, given, kinds in (
            ("layer", self.layer is not None, ("draft",)),
            ("engines", self.engines != usual, ("draft",)),
            ("adapter_file", self.adapter_file is not None, ("draft", "remote")),
            ("report_file", self.report_file is not None, ("draft", "remote")),
        ):
            if given and self.kind not in kinds:
                rule = f"means nothing to kind={self.kind}"
                faults.append(Fault(key, getattr(self, key), rule, f"leave it out, or set kind={kinds[0]}"))
        return faults
