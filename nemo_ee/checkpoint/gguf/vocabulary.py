# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The tokens of a GGUF file and what it says of them, with llama.cpp's defaults and its rules by name."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_ee.checkpoint.gguf.keys import REMEDY, TEMPLATES, shown
from nemo_ee.checkpoint.gguf.pre_tokenizers import Rule, rule_of
from nemo_ee.errors import CheckpointError

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6
"""Of ``tokenizer.ggml.token_type``; 1 is an ordinary token."""

_NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
"""llama.cpp's keys (``…_token_id``) and transformers' names."""
_ENDS = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")
"""Other keys whose tokens end a text."""

_ENDS_BY_NAME = {
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<｜end▁of▁sentence｜>",
    # ends of a file within a repository, when a code model fills in the middle
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "[PAD]",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
    "<|file_sep|>",
}
"""Tokens that end a text by their name, whatever the keys say. Source: llama.cpp's ``src/llama-vocab.cpp``."""

_HARMONY = ({"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"})
"""Beside either pair ``<|end|>`` ends a part of an answer, not the answer."""


@dataclass(frozen=True)
class Vocabulary:
    """Checked content of ``tokenizer.*``.

    Attributes:
        tokens: by id; unused ones at the end, which only fill up the embedding, are left out.
        types: of each token, llama.cpp's overrides by name applied.
        rule: of byte-level BPE; None for sentencepiece (``tokenizer.ggml.model=llama``).
        merges: of byte-level BPE.
        scores: of sentencepiece, per token.
        special: transformers' names (``bos_token``) with their ids.
        add_bos: whether a text begins with BOS.
        space_prefix: whether sentencepiece puts a space before a text.
        eos_token_ids: all that end a text, the tokenizer's own first.
        chat_template: one template, several by name, or None.
    """

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    rule: Rule | None
    merges: tuple[tuple[str, str], ...]
    scores: tuple[float, ...]
    special: dict[str, int]
    add_bos: bool
    space_prefix: bool
    eos_token_ids: tuple[int, ...]
    chat_template: str | dict[str, str] | None

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Vocabulary":
        """Reads all keys below ``tokenizer.``.

        Raises:
            CheckpointError: a key is missing, contradicts another, or names a tokenizer that is not supported.
        """
        prefix = "tokenizer.ggml."
        kind = values.get(f"{prefix}model")
        if kind not in ("gpt2", "llama"):
            raise CheckpointError(f"{prefix}model={shown(kind)}: must be gpt2 or llama; {REMEDY}")
        bytes_ = kind == "gpt2"
        # a file without a rule is split by llama.cpp's "default"
        rule = rule_of(values.get(f"{prefix}pre") or "default") if bytes_ else None
        tokens = _array(values, f"{prefix}tokens", str)
        tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(tokens)]
        _check_unique(tokens)
        types = _array(values, f"{prefix}token_type", int, len(tokens), default=1)
        ids = _ids(values, len(tokens), {} if bytes_ else {"bos": 1, "eos": 2, "unknown": 0})
        used = max(
            [number for number, type_ in enumerate(types) if type_ != UNUSED] + list(ids.values()), default=-1
        )
        del tokens[used + 1 :], types[used + 1 :]
        types = [
            CONTROL if token in _ENDS_BY_NAME else type_ for token, type_ in zip(tokens, types, strict=True)
        ]
        add_bos = _switch(values, f"{prefix}add_bos_token", rule.add_bos if rule else True)
        space_prefix = _switch(values, f"{prefix}add_space_prefix", not bytes_)
        for name, needed in (("eos", True), ("bos", add_bos)):
            if needed and name not in ids:
                raise CheckpointError(f"{prefix}{name}_token_id=null: must name a token; {REMEDY}")
        if bytes_ and space_prefix:
            raise CheckpointError(
                f"{prefix}add_space_prefix=True: must be False beside {prefix}model=gpt2; {REMEDY}"
            )
        return cls(
            tokens=tuple(tokens),
            types=tuple(types),
            rule=rule,
            merges=_merges(_array(values, f"{prefix}merges", str), set(tokens)) if bytes_ else (),
            scores=() if bytes_ else tuple(_array(values, f"{prefix}scores", float, len(tokens))),
            special={_NAMES[name]: token for name, token in ids.items() if name in _NAMES},
            add_bos=add_bos,
            space_prefix=space_prefix,
            eos_token_ids=_ends(tokens, ids),
            chat_template=_templates(values),
        )


def _ids(values: Mapping[str, Any], count: int, defaults: Mapping[str, int]) -> dict[str, int]:
    """The tokens that have a key of their own, by its name."""
    ids = {}
    for name in (*_NAMES, *_ENDS):
        key = f"tokenizer.ggml.{name}_token_id"
        token = values.get(key, defaults.get(name))
        if token is not None and not (type(token) is int and 0 <= token < count):
            raise CheckpointError(f"{key}={shown(token)}: must be one of {count} tokens; {REMEDY}")
        if token is not None:
            ids[name] = int(token)
    return ids


def _switch(values: Mapping[str, Any], key: str, default: bool) -> bool:
    if not isinstance(value := values.get(key, default), bool):
        raise CheckpointError(f"{key}={shown(value)}: must be true or false; {REMEDY}")
    return value


def _array(
    values: Mapping[str, Any], key: str, kind: type, length: int | None = None, default: Any = None
) -> list[Any]:
    """A list under ``key``, cut to ``length`` if longer; without the key, ``default`` that many times."""
    if key not in values and default is not None:
        return [default] * (length or 0)
    value = values.get(key)
    if not isinstance(value, list) or len(value) < (length or 0):
        found = "null" if value is None else shown(value)
        raise CheckpointError(f"{key}={found}: must be a list with an entry for each token; {REMEDY}")
    if value and type(value[0]) is not kind:  # the entries of a list have one type
        raise CheckpointError(f"{key}={shown(value)}: must have entries of type {kind.__name__}; {REMEDY}")
    if kind is float and any(map(math.isnan, value)):
        raise CheckpointError(f"{key}={shown(value)}: must have numbers; {REMEDY}")
    return list(value[:length])


def _check_unique(tokens: list[str]) -> None:
    seen: set[str] = set()
    for token in tokens:
        if token in seen:
            raise CheckpointError(f"tokenizer.ggml.tokens: {shown(token)!r} is there twice; {REMEDY}")
        seen.add(token)


def _merges(lines: list[str], tokens: set[str]) -> tuple[tuple[str, str], ...]:
    merges = []
    for line in lines:
        cut = line.find(" ", 1)
        pair = (line[:cut], line[cut + 1 :])
        if cut < 0 or not {*pair, "".join(pair)} <= tokens:
            raise CheckpointError(
                f"tokenizer.ggml.merges: {shown(line)!r} joins no two tokens to one; {REMEDY}"
            )
        merges.append(pair)
    return tuple(merges)


def _ends(tokens: list[str], ids: Mapping[str, int]) -> tuple[int, ...]:
    ends = [ids[name] for name in ("eos", *_ENDS) if name in ids]
    ends += [number for number, token in enumerate(tokens) if token in _ENDS_BY_NAME]
    texts = {tokens[number] for number in ends}
    if any(pair <= texts for pair in _HARMONY):
        ends = [number for number in ends if tokens[number] != "<|end|>" or number == ids["eos"]]
    return tuple(dict.fromkeys(ends))


def _templates(values: Mapping[str, Any]) -> str | dict[str, str] | None:
    prefix = f"{TEMPLATES}."
    named = {key.removeprefix(prefix): text for key, text in values.items() if key.startswith(prefix)}
    default = values.get(TEMPLATES)
    for key, text in (
        (TEMPLATES, default or ""),
        *((f"{prefix}{name}", text) for name, text in named.items()),
    ):
        if not isinstance(text, str):
            raise CheckpointError(f"{key}={shown(text)}: must be a text; {REMEDY}")
    if not named:
        return default
    return named if default is None else {"default": default, **named}
