# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which tokenizers a checkpoint may name, and what it may say of them.

NeMo has libraries whose files are programs (`tabular` unpickles one) and hands names in the section on as they are:
`special_tokens: {trust_remote_code: true}` reaches transformers as if the user had said so. Those listed here read
their files as text, JSON or SentencePiece's protocol buffers. That a name may be a folder on this machine, or a hub's
name, is no more than that: with ``trust_remote_code`` false, which no file can change, it holds data alone.
"""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

FILES = ("model", "vocab_file", "merge_file")
"""Keys of the ``tokenizer`` section that name single files."""

LIBRARIES = {
    "huggingface": ("vocab_file", "merge_file"),
    "sentencepiece": ("model",),
    "megatron": FILES,
    "tiktoken": ("vocab_file",),
    "byte-level": (),
}
"""Library -> those of `FILES` that it reads; the others are left out."""

MEGATRON_TYPES = (
    "GPT2BPETokenizer",
    "BertWordPieceLowerCase",
    "BertWordPieceCase",
    "GPTSentencePieceTokenizer",
    "megatron-gpt-345m",
    "megatron-bert-345m-uncased",
    "megatron-bert-345m-cased",
)
"""`tokenizer.type` of the library megatron; NeMo takes another for a library or for a hub's name."""

SUFFIXES = (".model", ".spm", ".json", ".txt", ".vocab", ".bpe", ".tiktoken", "vocab", "merges")
"""How the names of such files end, if they have a suffix at all."""

ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "pad", "unk", "mask", "sep", "cls"))
"""Keys of `special_tokens`, beside `additional_special_tokens`."""

_INSIDE = "nemo:tokenizer"
_DO_NOT_LOAD = "do not load it; get the file from a source you trust"
_OTHER = "give another checkpoint, or set it in the file to what is meant"
_VARIABLE = re.compile(r"\{_([^}]*)_\}")
_KNOWN_VARIABLE = re.compile(r"content|(bos|eos|pad|unk|mask|sep|cls)(_id)?")


def apply(section: dict) -> Iterator[tuple[str, Any, str]]:
    """Takes out of a checkpoint's ``tokenizer`` section what does not count, and finds what is not allowed.

    Args:
        section: plain values; changed.

    Yields:
        Key, value, and the rule it breaks with a remedy.
    """
    section.pop("trust_remote_code", None)
    library, kind = section.get("library"), section.get("type")
    if library is not None and not (isinstance(library, str) and library in LIBRARIES):
        known = ", ".join(LIBRARIES)
        yield "tokenizer.library", library, f"a checkpoint may have {known}; {_DO_NOT_LOAD}"
        return
    if not _is_name(kind):
        yield "tokenizer.type", kind, f"must be a printable text; {_OTHER}"
    elif library == "megatron" and kind not in MEGATRON_TYPES:
        yield "tokenizer.type", kind, f"with megatron, must be one of {', '.join(MEGATRON_TYPES)}; {_OTHER}"
    elif str(kind).startswith("nemo:") and kind != _INSIDE:
        yield "tokenizer.type", kind, f"a folder inside is called {_INSIDE}; {_OTHER}"
    for key in FILES:
        value = section.get(key)
        if value is None:
            continue
        if library is not None and key not in LIBRARIES[library]:
            section[key] = None
        elif not _is_name(value):
            yield f"tokenizer.{key}", value, f"must be a printable text; {_OTHER}"
        elif PurePosixPath(value).suffix and value != "???" and not value.endswith(SUFFIXES):
            yield f"tokenizer.{key}", value, f"must end in one of {', '.join(SUFFIXES)}; {_DO_NOT_LOAD}"
    for key in ("special_tokens", "additional_special_tokens"):
        if not _are_tokens(section.get(key)):
            rule = f"must be a list of texts, or texts by {', '.join(ROLES)}"
            yield f"tokenizer.{key}", section[key], f"{rule}; {_DO_NOT_LOAD}"
    for key, allowed in (("use_fast", bool), ("sentencepiece_legacy", bool), ("delimiter", str)):
        if not isinstance(section.get(key), allowed | None):
            yield f"tokenizer.{key}", section[key], f"must be a {allowed.__name__}; {_OTHER}"
    template = section.get("chat_template")
    if not _is_template(template):
        rule = "must be a template, templates by name, or NeMo's prefix and roles"
        yield "tokenizer.chat_template", template, f"{rule}; {_OTHER}"


def _is_name(value: Any) -> bool:
    """Of a file, folder or hub's page, to be shown on a terminal."""
    return value is None or (isinstance(value, str) and value.isprintable())


def _are_tokens(value: Any) -> bool:
    if isinstance(value, dict):
        others = value.get("additional_special_tokens")
        named = {key: token for key, token in value.items() if key != "additional_special_tokens"}
        return _are_texts(others) and named.keys() <= set(ROLES) and _are_texts(list(named.values()))
    return _are_texts(value)


def _are_texts(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(text, str) for text in value))


def _is_template(value: Any) -> bool:
    if isinstance(value, dict) and "roles" in value:  # NeMo asks its tokenizer for attributes of these names
        texts = [
            value.get("prefix", ""),
            *(value["roles"].values() if isinstance(value["roles"], dict) else [0]),
        ]
        return _are_texts(texts) and all(
            _KNOWN_VARIABLE.fullmatch(name) for text in texts for name in _VARIABLE.findall(text)
        )
    if isinstance(value, dict):
        return _are_texts(list(value.values()))
    if isinstance(value, list):
        return all(
            isinstance(one, dict) and {"name", "template"} <= one.keys() for one in value
        ) and _are_texts([text for one in value for text in one.values()])
    return isinstance(value, str | None)
