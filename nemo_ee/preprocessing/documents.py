# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Reading documents out of text files: which files, and what counts as one document in each.

Reading streams, so a corpus need not fit into memory (a ``.json`` file must: JSON cannot be read in part).
"""

import glob
import os
from collections.abc import Iterator, Sequence
from json import JSONDecodeError
from pathlib import Path

from nemo_ee.data.text_file import (
    LONGEST_JSON,
    LONGEST_LINE,
    check_characters,
    decoded,
    has_halves,
    parsed,
    read_lines,
    read_text,
    read_text_lines,
    with_newlines,
)
from nemo_ee.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".json")
DOCUMENT_RULES = ("file", "line", "paragraph")
"""What one document of a ``.txt`` file is. Records of JSON files are always one document each."""
_TOO_LONG = "set document=paragraph or document=line, or raise longest_document"
_LONG_LINE = "split or remove it, or raise longest_document"
_ONE_A_LINE = "write one record a line and name it .jsonl, e.g. with jq -c .[]"


def find_input_files(inputs: Sequence[str]) -> list[Path]:
    """Expands files, directories (searched recursively) and glob patterns into a list of text files.

    The order is the order of ``inputs``; within a directory or a pattern it is alphabetical, so that it does
    not depend on the file system. Folders that are links are searched only where they are named.

    Args:
        inputs: paths or glob patterns.

    Returns:
        Existing files with a supported suffix, each once.

    Raises:
        DataError: an input matches no file, or names a file with another suffix, or what is no file.
    """
    files: dict[Path, None] = {}
    for name in inputs:
        try:
            found = _files_of(name)
        except OSError as error:
            place = error.filename or name
            raise DataError(f"input={place}: cannot be read ({error.strerror}); check the path") from error
        for file in found:
            if file.suffix not in SUFFIXES:
                raise DataError(f"input={file}: must end in {_suffix_list()}; convert or rename the file")
            files[file] = None
    return list(files)


def _files_of(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        found = sorted(child for child in path.rglob("*") if child.is_file() and child.suffix in SUFFIXES)
        if not found:
            raise DataError(f"input={name}: must hold {_suffix_list()} files; the directory has none")
    elif path.exists():
        if not path.is_file():
            raise DataError(f"input={name}: is a pipe or a device, and no file; write it to a file first")
        found = [path]
    else:
        found = sorted(Path(match) for match in set(_matches(name)) if Path(match).is_file())
        if not found:
            raise DataError(f"input={name}: must exist; check the path or the pattern")
    return found


def _matches(pattern: str) -> Iterator[str]:
    """As `glob.glob(pattern, recursive=True)`, but ``**`` follows no links, which may lead in a circle."""
    parts = pattern.split("/")
    if "**" not in parts:
        yield from glob.glob(pattern)
        return
    place = parts.index("**")
    before, after = "/".join(parts[:place]), "/".join(parts[place + 1 :]) or "*"
    for root in glob.glob(before) if before else ["/" if place else "."]:
        for folder, folders, _ in os.walk(root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            yield from _matches(os.path.join(glob.escape(folder), after))


def iter_documents(path: Path, document: str, json_key: str, longest: int = LONGEST_LINE) -> Iterator[str]:
    """Yields the documents of one file in the order they are written, empty ones included.

    Args:
        path: a ``.txt``, ``.jsonl`` or ``.json`` file in UTF-8 (a byte order mark is dropped).
        document: for ``.txt``, what a document is: the whole ``file``, each ``line``, or each ``paragraph``
            (separated by blank lines). Ignored for the other two.
        json_key: for records that are objects, the key that holds the text. Records may also be plain
            strings. A ``.json`` file is a list of records or an object whose values are the records.
        longest: bytes that a document may have, and a line of a ``.jsonl`` file.

    Yields:
        One string per document. Blank lines and blank paragraphs of a ``.txt`` file are no documents.

    Raises:
        DataError: the file is missing, no plain file, not UTF-8, not valid JSON, longer than allowed, or a record
            lacks ``json_key`` (the message has the 1-based number of the record).
    """
    readers = {".txt": _iter_txt, ".jsonl": _iter_jsonl, ".json": _iter_json}
    return readers[path.suffix](path, document if path.suffix == ".txt" else json_key, longest)


def _iter_txt(path: Path, document: str, longest: int) -> Iterator[str]:
    if document == "file":
        yield with_newlines(read_text(path, longest, _TOO_LONG))
    elif document == "line":
        for _, line in read_text_lines(path, longest, _LONG_LINE):
            if line.strip():
                yield line.rstrip("\n")
    else:
        paragraph: list[str] = []
        size = 0
        for number, line in read_text_lines(path, longest, _LONG_LINE):
            if line.strip():
                paragraph.append(line)
                size += len(line)
                if size > longest:
                    rule = f"a paragraph has more than longest_document={longest} bytes"
                    raise DataError(f"{path}: line {number}: {rule}; set document=line, or split it")
            elif paragraph:
                yield "".join(paragraph).rstrip("\n")
                paragraph, size = [], 0
        if paragraph:
            yield "".join(paragraph).rstrip("\n")


def _iter_jsonl(path: Path, json_key: str, longest: int) -> Iterator[str]:
    name = str(path)
    for number, raw in read_lines(path, longest, _LONG_LINE):
        line = decoded(raw, place := f"{name}: line {number}")
        if not line.strip():
            continue
        where = f"{name}: record {number}"
        text = _text_of(parsed(line, place), json_key, where)
        if has_halves(line):
            check_characters(text, where)
        yield text


def _iter_json(path: Path, json_key: str, longest: int) -> Iterator[str]:
    whole = read_text(path, LONGEST_JSON, _ONE_A_LINE)
    try:
        content = parsed(whole, f"{path}:")
    except DataError as error:
        if isinstance(error.__cause__, JSONDecodeError):
            rule = f"must be one JSON value ({error.__cause__})"
            raise DataError(f"{path}: {rule}; if it holds one record a line, name it .jsonl") from error
        raise
    halves = has_halves(whole)
    del whole
    if isinstance(content, dict):
        named = ((f"{path}: record {n} ({k!r:.80})", v) for n, (k, v) in enumerate(content.items(), start=1))
    elif isinstance(content, list):
        named = ((f"{path}: record {n}", v) for n, v in enumerate(content, start=1))
    else:
        raise DataError(f"{path}: must be a list or an object of records, not {type(content).__name__}")
    for where, record in named:
        text = _text_of(record, json_key, where)
        if halves:
            check_characters(text, where)
        if len(text) > longest:
            rule = f"has more than longest_document={longest} characters"
            raise DataError(f"{where} {rule}, and would take too much memory; {_LONG_LINE}")
        yield text


def _text_of(record: object, json_key: str, where: str) -> str:
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise DataError(
            f"{where} must be a string or an object with the key {json_key!r}, not {type(record).__name__}"
        )
    if json_key not in record:
        known = (
            ", ".join(key if key.isprintable() else repr(key) for key in sorted(record)) or "no keys at all"
        )
        known = known if len(known) < 500 else f"{known[:500]}…"
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
