# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Text and JSON that come from elsewhere: read within bounds, and what is wrong is said with file and line."""

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from nemo_ee.errors import DataError

LONGEST_LINE = 16 * 2**20
"""Bytes of a line, and of a document: to tokenize it takes some 60 times as many bytes of memory."""
LONGEST_JSON = 512 * 2**20
"""Bytes of a `.json` file, which can only be read as a whole."""
_GZIP, _BYTE_ORDER_MARK = b"\x1f\x8b", b"\xef\xbb\xbf"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def open_text(path: str | os.PathLike) -> BinaryIO:
    """A file of text, open for reading its bytes, behind the byte order mark if it has one.

    Raises:
        DataError: it is missing, may not be read, is compressed, or is a folder, pipe or device. None is waited for.
    """
    try:
        # else opening a pipe would wait until somebody writes to it
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file; check the path") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read ({reason}); give a file that can") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise DataError(f"{path}: is a directory; name the files in it")
        raise DataError(f"{path}: is a pipe or a device, and no file; write it to a file first")
    stream = open(descriptor, "rb")
    begin = stream.read(3)
    if begin.startswith(_GZIP):
        stream.close()
        raise DataError(f"{path}: is compressed; unpack it with gunzip")
    stream.seek(len(_BYTE_ORDER_MARK) if begin == _BYTE_ORDER_MARK else 0)
    return stream


def read_text(path: str | os.PathLike, longest: int, remedy: str) -> str:
    """The whole of a file, line ends as they are.

    Args:
        path: of the file.
        longest: bytes that it may have.
        remedy: what to do if it has more.

    Raises:
        DataError: as `open_text`; it is longer, or no UTF-8.
    """
    with open_text(path) as stream, _reading(path):
        size = os.fstat(stream.fileno()).st_size
        # room is made for as many bytes as are asked for, even where there are fewer
        raw = b"" if size > longest + 3 else stream.read(min(size, longest) + 1)
        too_long = len(raw) > longest or bool(stream.read(1))
    if too_long:
        raise DataError(f"{path}: has more than {longest} bytes, and would be read as a whole; {remedy}")
    return decoded(raw, f"{path}:")


def read_lines(
    path: str | os.PathLike, longest: int = LONGEST_LINE, remedy: str = "split or remove it"
) -> Iterator[tuple[int, bytes]]:
    r"""The lines of a file with their numbers, from 1. They end with ``\n``, the last may not.

    Args:
        path: of the file.
        longest: bytes that a line may have.
        remedy: what to do if one has more.

    Raises:
        DataError: as `open_text`; or a line is longer.
    """
    with open_text(path) as stream, _reading(path):
        number = 0
        while line := stream.readline(longest + 1):
            number += 1
            if len(line) > longest:
                rule = f"line {number} has more than {longest} bytes"
                raise DataError(f"{path}: {rule}, and would take too much memory; {remedy}")
            yield number, line


def read_text_lines(
    path: str | os.PathLike, longest: int = LONGEST_LINE, remedy: str = "split or remove it"
) -> Iterator[tuple[int, str]]:
    r"""As `read_lines`, as text. They may end with ``\r\n`` or ``\r`` as well, and end with ``\n`` here.

    Raises:
        DataError: as `read_lines`; or a line is no UTF-8.
    """
    for number, raw in read_lines(path, longest, remedy):
        text = decoded(raw, f"{path}: line {number}")
        if "\r" in text:
            yield from ((number, f"{line}\n") for line in with_newlines(text).removesuffix("\n").split("\n"))
        else:
            yield number, text


def with_newlines(text: str) -> str:
    r"""Text whose lines all end with ``\n``."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def decoded(raw: bytes, where: str) -> str:
    """Bytes as text.

    Args:
        raw: of a line or a file.
        where: it is, for the message.

    Raises:
        DataError: they are no UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} must be UTF-8 text, byte {error.start} is not; convert the file (iconv -f ENCODING -t UTF-8)"
        ) from error


def parsed(text: str, where: str) -> Any:
    """What a JSON text says.

    Args:
        text: to read.
        where: it is, for the message.

    Raises:
        DataError: it is no JSON, is nested a thousand levels deep, or has a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is no JSON ({error}); correct or remove it") from error
    except ValueError as error:
        raise DataError(f"{where} has a number of too many digits; shorten or remove it") from error
    except RecursionError as error:
        raise DataError(f"{where} is nested too deeply; correct or remove it") from error


def has_halves(text: str) -> bool:
    r"""Whether JSON may hold halves of characters (`"\ud800"`), which no tokenizer takes; see `check_characters`."""
    return "\\u" in text and _SURROGATE.search(text) is not None


def check_characters(text: str, where: str) -> None:
    """Refuses halves of characters.

    Args:
        text: of JSON that `has_halves`.
        where: it is, for the message.

    Raises:
        DataError: it holds one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(f"{where} holds {half}, half of a character; correct or remove it") from error


@contextmanager
def _reading(path: str | os.PathLike) -> Iterator[None]:
    """Turns a disk that fails under a file into a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); copy it again") from error
