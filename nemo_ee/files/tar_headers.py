# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Reads tar archives from elsewhere: no number of a header is used before it has been checked.

Python's tarfile believes headers: a negative size makes it read one for ever (CVE-2025-8194), a long PAX header keeps
it busy for minutes (CVE-2024-6232), a sparse member of a few bytes fills a disk. What NeMo's archives consist of is
little: plain files and folders with headers in ustar's, GNU's or PAX's form, plain or gzipped. All else is refused.

Format: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar's manual, "Basic Tar Format".
"""

import gzip
import io
import os
import stat
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from nemo_ee.errors import CheckpointError

BLOCK = 512
MOST_HEADERS = 40_000
"""NeMo's archives have a few per rank that saved them; those of zarr's time one per chunk of a tensor."""
_MOST_EXTENSION, _MOST_RECORDS = 64 * 2**10, 32
"""Bytes of a long name or a PAX header, and records of the latter. Names alone need them, and sizes above 8 GiB."""
_MOST_NAME, _MOST_PART = 1024, 255
"""Bytes of a name, and of one between slashes: what file systems take."""
_INFLATION, _FREE_INFLATION = 20, 64 * 2**20
"""A gzipped archive holds at most so many bytes per byte read, beyond so many: weights shrink to a half at best."""

_COPY_AGAIN = "copy or download it again"
_DO_NOT_LOAD = "do not load it; get the file from a source you trust"
_CHUNK = 2**20
_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, OSError)
_END = bytes(BLOCK)
_OTHER_NUMBERS = (
    slice(100, 108),
    slice(108, 116),
    slice(116, 124),
    slice(136, 148),
    slice(329, 337),
    slice(337, 345),
)
"""Mode, owner, group, time, device."""
_SPARSE = (b"GNU.sparse.", b"SCHILY.realsize")


@dataclass(frozen=True)
class Member:
    """A plain file or a folder of an archive.

    Attributes:
        name: below the archive's top, without `./`.
        is_folder: whether it is one.
        size: in bytes; 0 for a folder.
        offset: where its bytes begin in the archive, once that is decompressed.
    """

    name: str
    is_folder: bool
    size: int
    offset: int


class TarArchive:
    """An open archive, whose headers have been read and are sound. The members' own bytes are not read for that.

    (Those of a gzipped one are decompressed, in pieces, up to the checksum at its end.)

    Args:
        path: of a file.

    Attributes:
        members: by name.

    Raises:
        CheckpointError: there is no such file, or it is damaged, hostile, or no tar archive.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            status = self.path.stat()
        except OSError as error:
            raise self._fault("no such file", "check the path") from error
        if not stat.S_ISREG(status.st_mode):
            raise self._fault("is neither a file nor a directory", "give a .nemo file")
        try:
            self._raw = open(self.path, "rb")
        except OSError as error:
            raise self._fault(f"cannot be opened ({error.strerror})", "change who may read it") from error
        self._left = status.st_size
        self._at = self._headers = 0
        self.members: dict[str, Member] = {}
        try:
            self._zipped = self._raw.read(2) == b"\x1f\x8b"
            self._raw.seek(0)
            self._file: Any = gzip.GzipFile(fileobj=self._raw) if self._zipped else self._raw
            self._read_headers()
        except _DAMAGED as error:
            self.close()
            raise self._fault(f"is truncated or damaged ({error})", _COPY_AGAIN) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "TarArchive":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._raw.close()

    def read(self, member: Member) -> bytes:
        """A file's content; ask for its size first."""
        content = io.BytesIO()
        self.copy(member, content)
        return content.getvalue()

    def copy(self, member: Member, sink: BinaryIO) -> None:
        """Writes a file's content to an open file.

        Raises:
            CheckpointError: it cannot be read.
        """
        place, end = member.offset, member.offset + member.size
        buffer = memoryview(bytearray(min(member.size, _CHUNK)))
        while place < end:
            try:
                self._file.seek(place)
                count = self._file.readinto(buffer[: end - place])
                if not count:
                    raise EOFError("its end comes too early")
            except _DAMAGED as error:
                raise self._fault(f"is truncated or damaged ({error})", _COPY_AGAIN) from error
            sink.write(buffer[:count])
            place += count

    def _read_headers(self) -> None:
        long_name: bytes | None = None
        pax: dict[bytes, bytes] = {}
        extensions: set[bytes] = set()
        while (header := self._take(BLOCK)) != _END:
            self._headers += 1
            if self._headers > MOST_HEADERS:
                raise self._fault(f"holds more than {MOST_HEADERS} headers", _DO_NOT_LOAD)
            kind, name, size = self._parse(header)
            if kind in b"LKxg":
                if kind in extensions or extensions | {kind} >= {b"L", b"x"}:
                    raise self._fault("names one member twice", _DO_NOT_LOAD)
                extensions.add(kind)
                text = self._extension(kind, size)
                if kind == b"L":
                    long_name = text.split(b"\0", 1)[0]
                elif kind == b"x":
                    pax = self._records(text)
                elif kind == b"g" and {b"path", b"size"} & self._records(text).keys():
                    raise self._fault("holds a PAX header for all members", _DO_NOT_LOAD)
                continue
            size = self._pax_size(pax[b"size"]) if b"size" in pax else size
            name = name if long_name is None else long_name
            self._add(kind, pax.get(b"path", name), size)
            long_name, pax, extensions = None, {}, set()
            self._skip(size)
        if extensions:
            raise EOFError("its last header belongs to no member")
        while self._zipped and self._take(_CHUNK, whole=False):
            pass  # gzip compares its checksum when it comes to its own end

    def _parse(self, header: bytes) -> tuple[bytes, bytes, int]:
        """Type, name and size of a header block."""
        try:
            if _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
                raise ValueError("wrong checksum")
            size = _number(header[124:136])
            for field in _OTHER_NUMBERS:  # other readers refuse a header, or end there, if one is none
                if header[field][0] != 0xFF:  # a time before 1970
                    _number(header[field])
        except ValueError as error:
            if self._headers == 1:
                raise self._fault(f"is no tar archive, so no .nemo file ({error})", _COPY_AGAIN) from error
            what = f"is truncated or damaged after {len(self.members)} members ({error})"
            raise self._fault(what, _COPY_AGAIN) from error
        name = header[:100].split(b"\0", 1)[0]
        prefix = header[345:500].split(b"\0", 1)[0]
        if (
            prefix and header[257:263] != b"ustar\0"
        ):  # GNU has times there, which others take for a part of the name
            raise self._fault("holds a name that readers differ about", _DO_NOT_LOAD)
        kind = header[156:157]
        if kind == b"\0":  # tar's before POSIX, which had no type for folders
            kind = b"5" if name.endswith(b"/") else b"0"
        return kind, (prefix + b"/" + name if prefix else name), size

    def _extension(self, kind: bytes, size: int) -> bytes:
        if size > _MOST_EXTENSION:
            raise self._fault(f"holds a header of {size} bytes", _DO_NOT_LOAD)
        return self._take(_padded(size))[:size]

    def _records(self, text: bytes) -> dict[bytes, bytes]:
        """The records of a PAX header, `<length> <key>=<value>\\n` each."""
        found: dict[bytes, bytes] = {}
        at = count = 0
        while at < len(text) and text[at]:
            count += 1
            space = text.find(b" ", at, at + 6)
            digits = text[at : max(space, at)]
            end = at + int(digits) if digits.isdigit() else 0
            record = text[space + 1 : end]
            key, equals, value = record[:-1].partition(b"=")
            if count > _MOST_RECORDS or end > len(text) or record[-1:] != b"\n" or not equals:
                raise self._fault("holds a PAX header that cannot be read", _DO_NOT_LOAD)
            if key == b"hdrcharset":
                raise self._fault("holds a PAX header whose names are no UTF-8", _DO_NOT_LOAD)
            if key.startswith(_SPARSE):
                raise self._fault("holds a sparse file", _DO_NOT_LOAD)
            found[key] = value
            at = end
        return found

    def _pax_size(self, digits: bytes) -> int:
        if not digits.isdigit() or len(digits) > 20:
            raise self._fault("holds a PAX header whose size is no number", _DO_NOT_LOAD)
        return int(digits)

    def _add(self, kind: bytes, raw_name: bytes, size: int) -> None:
        name = raw_name.decode("utf-8", "surrogateescape")
        path, shown = PurePosixPath(name), _shown(name)
        if kind not in (b"0", b"\0", b"5"):
            kinds = {b"1": "a link", b"2": "a link", b"S": "a sparse file"}
            what = kinds.get(kind, "a device or other special file")
            raise self._fault(f"member {shown} is {what}", _DO_NOT_LOAD)
        is_folder = kind == b"5"
        top = str(path) == "."
        if (
            path.is_absolute()
            or ".." in path.parts
            or "\\" in name
            or "\0" in name
            or (top and not is_folder)
        ):
            raise self._fault(f"member {shown} points outside the archive", _DO_NOT_LOAD)
        if len(raw_name) > _MOST_NAME or any(len(os.fsencode(part)) > _MOST_PART for part in path.parts):
            raise self._fault(f"member {shown} has a name of {len(raw_name)} bytes", _DO_NOT_LOAD)
        if name.endswith("/") and not is_folder:
            raise self._fault(f"member {shown} is a file with the name of a folder", _DO_NOT_LOAD)
        if is_folder and size:
            raise self._fault(f"member {shown} is a folder of {size} bytes", _DO_NOT_LOAD)
        if str(path) in self.members:
            raise self._fault(f"holds {shown} twice", _DO_NOT_LOAD)
        if not self._zipped and size > self._left:
            what = f"is truncated or damaged: member {shown} has {size} bytes and {self._left} are left"
            raise self._fault(what, _COPY_AGAIN)
        self.members[str(path)] = Member(str(path), is_folder, size, self._at)

    def _take(self, size: int, whole: bool = True) -> bytes:
        """The next bytes; fewer at the archive's end, unless `whole`."""
        data = self._file.read(size)
        if whole and len(data) != size:
            raise EOFError("its end comes too early")
        self._at += len(data)
        self._left -= len(data)
        if self._zipped and self._at > _FREE_INFLATION + _INFLATION * self._raw.tell():
            what = f"holds more than {_INFLATION} bytes for each byte of the gzipped file"
            raise self._fault(what, _DO_NOT_LOAD)
        return data

    def _skip(self, size: int) -> None:
        size = _padded(size)
        if self._zipped:
            while size:
                size -= len(self._take(min(size, _CHUNK)))
            return
        if size > self._left:
            raise EOFError("its end comes too early")
        self._file.seek(size, os.SEEK_CUR)
        self._at += size
        self._left -= size

    def _fault(self, what: str, remedy: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}; {remedy}")


def _number(field: bytes) -> int:
    """A header's number, in octal digits or, if it is large, in base 256.

    Raises:
        ValueError: it is neither, or negative.
    """
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if digits.strip(b"01234567"):
        raise ValueError("a number of a header is no number")
    return int(digits or b"0", 8)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:80]}…")
