# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Prompts for self-written text: files of every kind, what is refused, and those built from sources."""

import json
import re
from pathlib import Path

import pytest

from nemo_ee.errors import ConfigError, DataError
from nemo_ee.preprocessing.fetch import KNOWN_FILES, PackageFile
from nemo_ee.running.prompt_file import read_prompt_file
from nemo_ee.tuning_text.prompts import TASKS, TOPICS, key_of, read_prompts
from nemo_ee.tuning_text.settings import PromptsConfig, TuningTextConfig

HELD_OUT = Path(__file__).parents[2] / "scripts" / "benchmarks" / "held_out_prompts.jsonl"
TEXT = "One sentence. " * 100


def prompts(**settings):
    """What is asked last, of each prompt."""
    return [turns[-1]["content"] for turns in read_prompts(PromptsConfig(**settings), seed=3)]


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_files_of_both_kinds(tmp_path):
    plain = write(tmp_path / "a.txt", "Why?", "", "  What is\u2028this? ", "why?  ", "WHY?")
    assert prompts(file=plain) == ["Why?", "What is\u2028this?"], "each once, whatever its case and blanks"
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why?"},
    ]
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "So?"}]
    lines = [{"prompt": "A\nB"}, {"messages": talk}, {"messages": system}, {"question": "Q"}, "plain"]
    path = write(tmp_path / "b.jsonl", *map(json.dumps, lines))
    assert prompts(file=path) == ["A\nB", "Why?", "So?", "Q", "plain"]
    assert prompts(file=path, count=2) == ["A\nB", "Why?"]
    assert prompts(file=path, exclude_file=write(tmp_path / "c.txt", "so? ", "q")) == [
        "A\nB",
        "Why?",
        "plain",
    ]
    spoken = read_prompts(PromptsConfig(file=path, system="Be kind."), seed=3)
    assert [turns[0]["content"] for turns in spoken] == [
        "Be kind.",
        "Be kind.",
        "Be brief.",
        "Be kind.",
        "Be kind.",
    ]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "no JSON"),
        ('{"text": 3}', "has no text under prompt, text, question, and no messages"),
        ('{"prompt": " "}', "has no text"),
        ('{"messages": []}', "messages must be"),
        ('{"messages": [{"role": "assistant", "content": "Hi"}]}', "messages must be"),
        (
            '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]}',
            "end with the user",
        ),
        ('{"messages": [{"role": "system", "content": "Hi"}]}', "messages must be"),
        ('{"messages": [{"role": "user", "content": ["Hi"]}]}', "messages must be"),
    ],
)
def test_lines_that_are_no_prompts(tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", '"first"', line)
    with pytest.raises(ConfigError, match=f"^prompts.file={re.escape(path)}:2: .*{message}"):
        prompts(file=path)


def test_files_without_prompts(tmp_path):
    with pytest.raises(ConfigError, match="prompts.file=.*none.txt: there is no such file"):
        prompts(file=str(tmp_path / "none.txt"))
    with pytest.raises(ConfigError, match="holds no prompts; write one"):
        prompts(file=write(tmp_path / "empty.txt", ""))
    path = write(tmp_path / "all.txt", "Why?")
    with pytest.raises(ConfigError, match="holds no prompts that are not excluded"):
        prompts(file=path, exclude_file=path)


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A directory with small files in the places of what is downloaded."""
    for name in ("gsm8k-questions", "boolq-questions", "wikipedia-intros"):
        monkeypatch.setitem(KNOWN_FILES, name, PackageFile("none", "0", "none"))
    write(
        tmp_path / "gsm8k-questions.jsonl",
        *(json.dumps({"question": f"{n} eggs?", "answer": "3"}) for n in range(4)),
    )
    records = ({"question": f"is {n} even", "passage": f"About {n}. {TEXT}"} for n in range(12))
    write(tmp_path / "boolq-questions.jsonl", *map(json.dumps, records))
    articles = {f"T{n}": {"title": f"T{n}", "extract": TEXT} for n in range(30)}
    (tmp_path / "wikipedia-intros.json").write_text(json.dumps(articles))
    return str(tmp_path)


def test_sources_take_turns(sources):
    asked = prompts(directory=sources)
    assert len(asked) == 46 and len(set(asked)) == 46
    assert sorted(asked[:12:3]) == [f"{n} eggs?" for n in range(4)], "the first of three"
    assert asked[:12:3] != sorted(asked[:12:3]), "in a random order"
    assert asked == prompts(directory=sources), "which is the seed's"
    for template in TASKS:
        form = (
            re.escape(template)
            .replace(r"\{text\}", r"About \d+\. (One sentence. )*One sentence\.")
            .replace(r"\{question\}", r"Is \d+ even\?")
        )
        assert any(re.fullmatch(form, text) for text in asked), template
    assert max(map(len, asked)) < 700
    for template in TOPICS:
        assert any(re.fullmatch(re.escape(template).replace(r"\{title\}", r"T\d+"), text) for text in asked)
    assert prompts(directory=sources, sources=("gsm8k",), count=3) == asked[:9:3]


def test_a_damaged_source_is_named(sources):
    Path(sources, "boolq-questions.jsonl").write_text('{"question": "is it"}\n')
    with pytest.raises(DataError, match="boolq-questions.jsonl: is not what it should be.*passage"):
        prompts(directory=sources)


def test_held_out_prompts_are_none_that_are_built():
    held = [turns[0]["content"] for turns in read_prompt_file(str(HELD_OUT), "prompts.exclude_file")]
    assert len(held) == len({key_of([{"role": "user", "content": text}]) for text in held}) == 40
    kinds = [json.loads(line)["kind"] for line in HELD_OUT.read_text().splitlines()]
    assert len(set(kinds)) >= 7 and min(map(kinds.count, kinds)) >= 4
    for template in TOPICS:
        form = re.escape(template).replace(r"\{title\}", ".+")
        assert not [text for text in held if re.fullmatch(form, text, re.IGNORECASE)], template


@pytest.mark.parametrize(
    "values, message",
    [
        ({"prompts": {"sources": ["gsm8"]}}, "prompts.sources=gsm8: not one of .*did you mean gsm8k"),
        ({"prompts": {"sources": []}}, "prompts.sources=.*nothing would be asked"),
        ({"prompts": {"sources": ["boolq", "boolq"]}}, "each can be named once"),
        ({"prompts": {"count": 0}}, "prompts.count=0: must be positive"),
        ({"inference": {"tokens_to_generate": 0}}, "inference.tokens_to_generate=0: must be positive"),
        ({"inference": {"temprature": 1}}, "inference.temprature=1: unknown key; did you mean temperature"),
        ({"validation_share": 1}, "validation_share=1.0: must be a share"),
        ({"minutes": 0}, "minutes=0.0: must be positive"),
        ({"weights": "int4"}, "weights=int4: not one of"),
        ({"output_prefix": "???"}, "output_prefix=null: is required"),
    ],
)
def test_settings_that_break_a_rule(values, message):
    with pytest.raises(ConfigError, match=message):
        TuningTextConfig.from_dict({"gpt_model_file": "a.nemo", "output_prefix": "b", **values})
