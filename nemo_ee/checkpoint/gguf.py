# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""GGUF files as a source of models: checks before loading, and the tokenizer as the file describes it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ee.errors import CheckpointError

ARCHITECTURES = ("llama", "qwen2")
_MAGIC = b"GGUF"


@dataclass(frozen=True)
class GGUFTokenizer:
    """The special tokens of a GGUF file, which transformers' conversion gets wrong in part."""

    special: dict[str, str]
    add_bos: bool
    chat_template: str | None
    eos_token_ids: tuple[int, ...] = ()


def is_gguf(path: str | os.PathLike) -> bool:
    """Whether ``path`` is a file that begins, or by its suffix should begin, as a GGUF file does."""
    path = Path(path)
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return path.suffix == ".gguf" or file.read(4) == _MAGIC


def inspect(path: str | os.PathLike) -> GGUFTokenizer:
    """Checks a GGUF file and reads its tokenizer's settings; tensors stay on disk (memory-mapped).

    Raises:
        CheckpointError: not a GGUF file, truncated, or of an unsupported architecture.
    """
    from gguf import GGUFReader

    path = Path(path)
    with open(path, "rb") as file:
        if file.read(4) != _MAGIC:
            raise CheckpointError(
                f"{path}: is no GGUF file (it does not begin with 'GGUF'); download it again"
            )
    try:
        reader = GGUFReader(path)
    except Exception as error:  # a cut file fails wherever the reader happens to be
        raise CheckpointError(
            f"{path}: is truncated or damaged ({type(error).__name__}: {error}); download it again"
        ) from error

    def value(key: str, default: Any = None) -> Any:
        field = reader.fields.get(key)
        return default if field is None else field.contents()

    architecture = value("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"general.architecture={architecture}: must be one of {', '.join(ARCHITECTURES)}; "
            "convert another file"
        )
    tokens = reader.fields["tokenizer.ggml.tokens"]
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = value(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            special[f"{name}_token"] = tokens.contents(int(token))
    # llama.cpp's defaults where the file does not say: sentencepiece models add a BOS, byte-pair models do
    # not
    add_bos = value("tokenizer.ggml.add_bos_token", value("tokenizer.ggml.model") == "llama")
    return GGUFTokenizer(special, bool(add_bos), value("tokenizer.chat_template"))


def load_tokenizer(path: str | os.PathLike) -> Any:
    """The tokenizer of a GGUF file as a plain ``PreTrainedTokenizerFast``.

    transformers' own conversion of SmolLM2's file takes ``<|im_start|>`` for the end of text and prepends it
    to every text; here special tokens, BOS and chat template are those that the file names.

    Raises:
        CheckpointError: see :func:`inspect`.
    """
    from tokenizers.processors import ByteLevel, TemplateProcessing
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(path)
    settings = inspect(path)
    try:
        converted = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:  # transformers indexes whatever fields it expects
        raise CheckpointError(
            f"{path}: transformers cannot read its tokenizer ({type(error).__name__}: {error}); "
            "convert a Hugging Face directory instead"
        ) from error
    backend = converted.backend_tokenizer
    bos = settings.special.get("bos_token")
    if settings.add_bos and bos is not None:
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
    else:
        backend.post_processor = ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        chat_template=settings.chat_template,
        **settings.special,
    )
