# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Files of prompts, each a conversation that waits for an answer."""

import json
from pathlib import Path

from nemo_ee.errors import ConfigError, Fault
from nemo_ee.inference.settings import PROMPT_KEYS

Turns = list[dict[str, str]]
"""A conversation that waits for an answer: `{"role": "system" | "user" | "assistant", "content": …}` each."""


def read_prompt_file(path: str, key: str) -> list[Turns]:
    """Prompts of a `.jsonl` file, or of a text file with a prompt per line.

    Args:
        path: of the file.
        key: what the user sets to it.

    Raises:
        ConfigError: it cannot be read, holds none, or a line of it is no prompt.
    """
    try:
        # Not splitlines(): a JSON string may hold U+2028 and others that it takes for line ends.
        lines = list(enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), start=1))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(Fault(key, path, f"cannot be read ({error})", "give a text file")) from error
    lines = [(number, line.strip()) for number, line in lines if line.strip()]
    if not lines:
        raise ConfigError(Fault(key, path, "holds no prompts", "write one per line"))
    if not path.endswith(".jsonl"):
        return [question(line) for _, line in lines]
    return [_of_json(line, f"{path}:{number}", key) for number, line in lines]


def _of_json(line: str, where: str, key: str) -> Turns:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(Fault(key, where, f"no JSON ({error.msg})", "fix it")) from error
    if isinstance(value, dict) and "messages" in value:
        return _checked(value["messages"], where, key)
    texts = [value[name] for name in PROMPT_KEYS if name in value] if isinstance(value, dict) else [value]
    if not texts or not isinstance(texts[0], str) or not texts[0].strip():
        rule = f"has no text under {', '.join(PROMPT_KEYS)}, and no messages"
        raise ConfigError(Fault(key, where, rule, 'write e.g. {"prompt": "Why is the sky blue?"}'))
    return question(texts[0])


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
