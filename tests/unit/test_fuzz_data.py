# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Text, JSON and datasets made at random: read as Python and megatron-core read them, or refused by one error."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_ee.data.chats.chat_template import messages_of
from nemo_ee.data.chats.json_lines import JsonLines
from nemo_ee.data.index_file import open_indexed_file
from nemo_ee.errors import ConfigError, DataError
from nemo_ee.preprocessing.documents import iter_documents
from nemo_ee.running.prompt_file import PROMPT_KEYS, read_prompt_file, read_texts
from tests.support import hostile_data
from tests.support.fuzz import EXAMPLES, fuzz, refusal_of
from tests.support.text_examples import datasets, texts, whole_files

KNOWN = [
    hostile_data.HONEST + each.line + b"\n" + hostile_data.HONEST for each in hostile_data.LINES.values()
]


def lines_of(data: bytes) -> list[str]:
    """Lines that are not blank, as Python splits them by line feeds alone."""
    return [line for line in data.removeprefix(b"\xef\xbb\xbf").decode().split("\n") if line.strip()]


def text_of(record: Any) -> str:
    return record if isinstance(record, str) else record["text"]


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("suffix", (".jsonl", ".json", ".txt"))
def test_documents(suffix, examples, tmp_path):
    """Documents are the records that json reads; of a text, its lines, paragraphs, or all of it."""
    path = tmp_path / f"d{suffix}"

    def check(data: bytes) -> bool:
        path.write_bytes(data)
        fine = False
        for rule in ("file", "line", "paragraph") if suffix == ".txt" else ("file",):
            found, refused = refusal_of(
                lambda rule=rule: list(iter_documents(path, rule, "text")), DataError, path
            )
            if refused:
                continue
            fine = True
            whole = data.removeprefix(b"\xef\xbb\xbf").decode()
            plain = whole.replace("\r\n", "\n").replace("\r", "\n")
            if suffix == ".jsonl":
                assert found == [text_of(json.loads(line)) for line in lines_of(data)]
            elif suffix == ".json":
                records = json.loads(whole)
                assert found == [
                    text_of(one) for one in (records.values() if isinstance(records, dict) else records)
                ]
            elif rule == "file":
                assert found == [plain]
            elif rule == "line":
                assert found == [line for line in plain.split("\n") if line.strip()]
            else:
                assert "".join(found).replace("\n", "") == "".join(
                    line for line in plain.split("\n") if line.strip()
                )
            for text in found:
                text.encode("utf-8")
        return fine

    made = whole_files() if suffix == ".json" else texts()
    assert fuzz(made, check, examples, KNOWN) > examples / 40


@pytest.mark.parametrize("examples", EXAMPLES)
def test_lines_to_learn_from(examples, tmp_path):
    """Objects are those that json reads from the same lines; chats are messages with texts, or refused."""
    path = tmp_path / "l.jsonl"

    def read() -> list[dict]:
        lines = JsonLines(str(path))
        return [lines[number] for number in range(len(lines))]

    def check(data: bytes) -> bool:
        path.write_bytes(data)
        found, refused = refusal_of(read, DataError, path)
        if refused:
            return False
        given = [
            json.loads(line)
            for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
            if line not in (b"", b"\r")
        ]
        assert json.dumps(found) == json.dumps(given)
        for one in found:
            try:
                messages, learnt = messages_of(one)
            except ValueError as error:
                assert str(error)
                continue
            assert len(messages) == len(learnt) and any(learnt)
            assert all(
                isinstance(each["role"], str) and isinstance(each["content"], str) for each in messages
            )
        return True

    assert fuzz(texts(), check, examples, KNOWN) > examples / 20


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("suffix", (".jsonl", ".txt"))
def test_prompts(suffix, examples, tmp_path):
    """Prompts are the texts under their keys, and conversations that wait for an answer."""
    path = tmp_path / f"p{suffix}"

    def check(data: bytes) -> bool:
        path.write_bytes(data)
        prompts, no_prompts = refusal_of(
            lambda: read_prompt_file(str(path), "prompts.file"), ConfigError, path
        )
        plain, no_texts = refusal_of(lambda: read_texts(str(path), "prompts_file"), ConfigError, path)
        for turns in prompts or ():
            assert turns and all(isinstance(turn[key], str) for turn in turns for key in ("role", "content"))
            assert turns[-1]["role"] == "user"
        if plain is not None:
            whole = data.removeprefix(b"\xef\xbb\xbf").decode().replace("\r\n", "\n").replace("\r", "\n")
            lines = [line for line in whole.split("\n") if line.strip()]
            if suffix == ".txt":
                assert plain == lines
            else:
                for text, line in zip(plain, lines, strict=True):
                    value = json.loads(line)
                    assert text == value or text in [value[key] for key in PROMPT_KEYS if key in value]
        return not (no_prompts and no_texts)

    assert fuzz(texts(), check, examples, KNOWN) > examples / 20


@pytest.mark.parametrize("examples", EXAMPLES)
def test_indexed_datasets(examples, tmp_path):
    """What is accepted has the sequences and documents that megatron-core finds."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = tmp_path / "d"

    def known() -> Iterator[dict]:
        for changes, _ in hostile_data.DATASETS.values():
            yield {**changes, "spoil": None}

    def check(said: dict) -> bool:
        said = dict(said)
        spoil = said.pop("spoil")
        hostile_data.indexed_dataset(prefix, **said)
        if spoil:
            index = bytearray(Path(f"{prefix}.idx").read_bytes())
            index[spoil[0] : spoil[0] + len(spoil[1])] = spoil[1]
            Path(f"{prefix}.idx").write_bytes(index)
        found, refused = refusal_of(lambda: open_indexed_file(str(prefix)), DataError, prefix)
        if refused:
            return False
        theirs = IndexedDataset(str(prefix), mmap=False) if found.tokens else None
        if theirs is not None:
            assert theirs.sequence_lengths.tolist() == found.sequence_lengths.tolist()
            assert theirs.document_indices[-1] == len(found.sequence_lengths)
            ids = found.token_ids()
            assert ids.dtype == theirs.index.dtype
            for number in range(len(found.sequence_lengths)):
                mine = ids[found.sequence_range(number, number + 1)]
                np.testing.assert_array_equal(mine, theirs[number])
        return True

    assert fuzz(datasets(), check, examples, known()) > examples / 20
