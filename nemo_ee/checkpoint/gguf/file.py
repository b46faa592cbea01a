# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Opening a GGUF file: all of it is checked before a weight is read."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_ee.checkpoint.gguf import header, keys, model, rope, tensors
from nemo_ee.checkpoint.gguf.tokenizer import build
from nemo_ee.checkpoint.gguf.vocabulary import Vocabulary
from nemo_ee.errors import CheckpointError


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file that passed every check. Its tensors stay on disk, memory-mapped, until they are read.

    Attributes:
        config: the model as a transformers configuration.
        vocabulary: tokens, and what the file says of them.
    """

    config: Any
    vocabulary: Vocabulary
    _tensors: Mapping[str, Any]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end a text for llama.cpp, the tokenizer's own EOS first."""
        return self.vocabulary.eos_token_ids

    def load_tokenizer(self) -> Any:
        """The tokenizer, as a plain ``PreTrainedTokenizerFast``."""
        return build(self.vocabulary)

    def load_weights(self) -> dict[str, torch.Tensor]:
        """A Hugging Face state dict in fp32, dequantised and in Hugging Face's order of rotary dimensions."""
        return tensors.load(self._tensors, self.config)


def is_gguf(path: str | os.PathLike) -> bool:
    """Whether ``path`` is a file that begins, or by its suffix should begin, as a GGUF file does."""
    path = Path(path)
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return path.suffix == ".gguf" or file.read(4) == header.MAGIC


def inspect(path: str | os.PathLike) -> GGUFFile:
    """Opens a GGUF file and checks every key and every tensor of it.

    Raises:
        CheckpointError: not a GGUF file, damaged, of an unsupported architecture, or with a key or tensor that
            would be lost; all faults, one per line.
    """
    path = Path(path)
    values, found = header.read(path)
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in model.ARCHITECTURES:
        raise CheckpointError(
            f"{path}: general.architecture={keys.shown(architecture)}: "
            f"must be one of {', '.join(model.ARCHITECTURES)}; "
            "convert another file"
        )
    faults = list(keys.faults(values, architecture))

    def collect(step: Any) -> Any:
        try:
            return step()
        except CheckpointError as error:
            faults.extend(str(error).splitlines())
            return None

    config = collect(partial(model.config, values, found))
    vocabulary = collect(partial(Vocabulary.read, values))
    if config is not None:
        collect(partial(tensors.check, found, config))
    if faults:
        raise CheckpointError("\n".join(f"{path}: {fault}" for fault in faults))
    return GGUFFile(
        config, vocabulary, {name: each for name, each in found.items() if name != rope.FREQUENCIES}
    )
