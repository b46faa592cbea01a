# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Reading documents out of text files: which files, and what counts as one document in each.

Reading streams, so a corpus need not fit into memory (a ``.json`` file must: JSON cannot be read in part).
"""

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_ee.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".json")
DOCUMENT_RULES = ("file", "line", "paragraph")
"""What one document of a ``.txt`` file is. Records of JSON files are always one document each."""


def find_input_files(inputs: Sequence[str]) -> list[Path]:
    """Expands files, directories (searched recursively) and glob patterns into a list of text files.

    The order is the order of ``inputs``; within a directory or a pattern it is alphabetical, so that it does
    not depend on the file system.

    Args:
        inputs: paths or glob patterns.

    Returns:
        Existing files with a supported suffix, each once.

    Raises:
        DataError: an input matches no file, or names a file with another suffix.
    """
    files: dict[Path, None] = {}
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = sorted(child for child in path.rglob("*") if child.is_file() and child.suffix in SUFFIXES)
            if not found:
                raise DataError(f"input={name}: must hold {_suffix_list()} files; the directory has none")
        elif path.exists():
            found = [path]
        else:
            found = sorted(Path(match) for match in glob.glob(name, recursive=True) if Path(match).is_file())
            if not found:
                raise DataError(f"input={name}: must exist; check the path or the pattern")
        for file in found:
            if file.suffix not in SUFFIXES:
                raise DataError(f"input={file}: must end in {_suffix_list()}; convert or rename the file")
            files[file] = None
    return list(files)


def iter_documents(path: Path, document: str, json_key: str) -> Iterator[str]:
    """Yields the documents of one file in the order they are written, empty ones included.

    Args:
        path: a ``.txt``, ``.jsonl`` or ``.json`` file in UTF-8 (a byte order mark is dropped).
        document: for ``.txt``, what a document is: the whole ``file``, each ``line``, or each ``paragraph``
            (separated by blank lines). Ignored for the other two.
        json_key: for records that are objects, the key that holds the text. Records may also be plain
            strings. A ``.json`` file is a list of records or an object whose values are the records.

    Yields:
        One string per document. Blank lines and blank paragraphs of a ``.txt`` file are no documents.

    Raises:
        DataError: the file is not UTF-8, not valid JSON, or a record lacks ``json_key`` (the message has the
            1-based number of the record).
    """
    readers = {".txt": _iter_txt, ".jsonl": _iter_jsonl, ".json": _iter_json}
    rule = document if path.suffix == ".txt" else json_key
    try:
        yield from readers[path.suffix](path, rule)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: must be UTF-8 text, byte {error.start} is not; convert the file") from error


def _iter_txt(path: Path, document: str) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as stream:
        if document == "file":
            yield stream.read()
        elif document == "line":
            for line in stream:
                if line.strip():
                    yield line.rstrip("\n")
        else:
            paragraph: list[str] = []
            for line in stream:
                if line.strip():
                    paragraph.append(line)
                elif paragraph:
                    yield "".join(paragraph).rstrip("\n")
                    paragraph = []
            if paragraph:
                yield "".join(paragraph).rstrip("\n")


def _iter_jsonl(path: Path, json_key: str) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}: line {number} is not JSON ({error}); correct or remove it"
                ) from error
            yield _text_of(record, json_key, f"{path}: record {number}")


def _iter_json(path: Path, json_key: str) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as stream:
        try:
            content = json.load(stream)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}: must be one JSON value ({error}); if it holds one record a line, name it .jsonl"
            ) from error
    if isinstance(content, dict):
        for number, (name, record) in enumerate(content.items(), start=1):
            yield _text_of(record, json_key, f"{path}: record {number} ({name!r})")
    elif isinstance(content, list):
        for number, record in enumerate(content, start=1):
            yield _text_of(record, json_key, f"{path}: record {number}")
    else:
        raise DataError(f"{path}: must be a list or an object of records, not {type(content).__name__}")


def _text_of(record: object, json_key: str, where: str) -> str:
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise DataError(
            f"{where} must be a string or an object with the key {json_key!r}, not {type(record).__name__}"
        )
    if json_key not in record:
        known = ", ".join(sorted(map(str, record))) or "no keys at all"
        raise DataError(
            f"{where} has no key {json_key!r}; set json_key to one that all records have ({known})"
        )
    text = record[json_key]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: {json_key!r} must be text, not {type(text).__name__}; choose another json_key"
        )
    return text


def _suffix_list() -> str:
    return ", ".join(SUFFIXES)
