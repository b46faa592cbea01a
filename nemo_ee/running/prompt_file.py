# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Files of prompts: texts to continue, or conversations that wait for an answer."""

import json
from typing import Any

from nemo_ee.data.text_file import check_characters, has_halves, parsed, read_text_lines
from nemo_ee.errors import ConfigError, DataError, Fault

Turns = list[dict[str, str]]
"""A conversation that waits for an answer: `{"role": "system" | "user" | "assistant", "content": …}` each."""
Prompt = str | list[int]
"""A text to continue, or its token ids."""
PROMPT_KEYS = ("prompt", "text", "question")
"""Keys under which a JSONL line may hold its prompt."""
LARGEST = 256 * 2**20
"""Characters of a file of prompts, which are all held in memory."""


def read_texts(path: str, key: str, token_ids: bool = False) -> list[Prompt]:
    """Texts of a `.jsonl` file, or of a text file with one per line.

    Args:
        path: of the file.
        key: what the user sets to it.
        token_ids: a line of a `.jsonl` file may also have a list of token ids.

    Raises:
        ConfigError: it cannot be read, holds none, or a line of it is no text.
    """
    return [
        line if where is None else _prompt(_value(line, where, key), where, key, token_ids)
        for line, where in _lines(path, key)
    ]


def read_prompt_file(path: str, key: str) -> list[Turns]:
    """Prompts of a `.jsonl` file, or of a text file with a prompt per line.

    Args:
        path: of the file.
        key: what the user sets to it.

    Raises:
        ConfigError: it cannot be read, holds none, or a line of it is no prompt.
    """
    return [
        question(line.strip()) if where is None else _turns(_value(line, where, key), where, key)
        for line, where in _lines(path, key)
    ]


def _lines(path: str, key: str) -> list[tuple[str, str | None]]:
    """Lines that are not blank; and of a `.jsonl` file where each stands."""
    is_json = path.endswith(".jsonl")
    found: list[tuple[str, str | None]] = []
    size = 0
    try:
        for number, line in read_text_lines(path):
            size += len(line)
            if size > LARGEST:
                rule = f"has more than {LARGEST} characters, and would be held in memory"
                raise ConfigError(Fault(key, path, rule, "split it"))
            if line.strip():
                found.append((line.rstrip("\n"), f"{path}:{number}" if is_json else None))
    except DataError as error:
        raise _in_key(error, path, key) from error
    if not found:
        raise ConfigError(Fault(key, path, "holds no prompts", "write one per line"))
    return found


def _value(line: str, where: str, key: str) -> Any:
    try:
        value = parsed(line, where)
        if has_halves(line):
            check_characters(json.dumps(value, ensure_ascii=False), where)
    except DataError as error:
        raise _in_key(error, where, key) from error
    return value


def _in_key(error: DataError, where: str, key: str) -> ConfigError:
    """What is wrong with a file, under the key that names it."""
    rule, _, remedy = str(error).removeprefix(where).removeprefix(":").strip().rpartition("; ")
    return ConfigError(Fault(key, where, rule, remedy))


def _prompt(value: Any, where: str, key: str, token_ids: bool) -> Prompt:
    held = (
        next((value[name] for name in PROMPT_KEYS if name in value), None)
        if isinstance(value, dict)
        else value
    )
    if token_ids and isinstance(held, list) and held and all(type(token) is int for token in held):
        return held
    return _text(value, where, key)


def _text(value: Any, where: str, key: str, or_else: str = "") -> str:
    texts = [value[name] for name in PROMPT_KEYS if name in value] if isinstance(value, dict) else [value]
    if not texts or not isinstance(texts[0], str):
        rule = f"has no text under {', '.join(PROMPT_KEYS)}{or_else}"
        raise ConfigError(Fault(key, where, rule, 'write e.g. {"prompt": "Why is the sky blue?"}'))
    return texts[0]


def _turns(value: Any, where: str, key: str) -> Turns:
    if isinstance(value, dict) and "messages" in value:
        return _checked(value["messages"], where, key)
    text = _text(value, where, key, or_else=", and no messages")
    if not text.strip():
        raise ConfigError(Fault(key, where, "has no text", "leave the line out"))
    return question(text)


def _checked(messages: object, where: str, key: str) -> Turns:
    """Messages that a model can answer: a system message or none, then the user's and the assistant's in turn."""
    turns = messages if isinstance(messages, list) else []
    fields = all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    )
    roles = [turn["role"] for turn in turns] if fields else []
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if len(spoken) % 2 != 1 or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
        rule = "messages must be role and content each: a system message or none, then user and assistant in turn"
        remedy = 'end with the user, e.g. {"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'
        raise ConfigError(Fault(key, where, rule, remedy))
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def question(text: str) -> Turns:
    """A conversation that begins with it."""
    return [{"role": "user", "content": text}]
