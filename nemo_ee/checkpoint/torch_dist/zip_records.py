# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The zip archives that `torch.save` writes, judged by their directory before torch unpacks them.

torch makes room for as many bytes as the directory says a record has once unpacked, and never checks that there are as
many as a tensor's shape needs: it enlarges the storage.
"""

import io
import struct
import zipfile
from collections.abc import Callable

_LAST = struct.Struct("<10xHLL2x")
_LAST_64 = struct.Struct("<32xQQQ8xQ4x")
_ENTRY = struct.Struct("<10xH8xLLHHH12x")
"""What stands at an archive's end: its last 22 bytes, their 64-bit forms before them, and an entry of its directory.

Source: PKWARE's APPNOTE.TXT, section 4.3.
"""
_DIRECTORY = 4096
"""Bytes at an archive's end that hold the directory of one tensor's: some ten records."""


class ZipRecordsError(ValueError):
    """What is wrong, without a name."""


def check_tensor(read: Callable[[int, int], bytes], length: int, needed: int) -> None:
    """Checks an archive that one tensor was saved to; reads its end alone.

    Args:
        read: (offset, count) -> those bytes of the archive.
        length: of the archive.
        needed: bytes of the tensor's elements.

    Raises:
        ZipRecordsError: it is no zip archive, is compressed, or has not as many bytes for the elements.
    """
    start = max(0, length - _DIRECTORY)
    end = read(start, length - start)
    stored = _plainly_stored(end, length)
    if stored is None:
        records = _records(end, length)
        _check_unpacked(records, length)
        stored = sum(record.file_size for record in records if "/data/" in record.filename)
    if stored != needed:
        raise ZipRecordsError(f"{stored} bytes are stored where its shape needs {needed}")


def check_archive(data: bytes) -> None:
    """Checks a whole archive that any object was saved to.

    Raises:
        ZipRecordsError: it is no zip archive, or larger when unpacked.
    """
    _check_unpacked(_records(data, len(data)), len(data))


def check_file(path: str) -> None:
    """As `check_archive`, of a file that is left on the disk.

    Raises:
        ZipRecordsError: see there.
        OSError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            length = file.seek(0, io.SEEK_END)
            file.seek(max(0, length - _DIRECTORY))
            _directory(file.read(), length)
            with zipfile.ZipFile(file) as archive:
                _check_unpacked(archive.infolist(), length)
    except ZipRecordsError:
        raise
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ZipRecordsError(f"it is no zip archive as torch.save writes ({error})") from error


def _plainly_stored(end: bytes, length: int) -> int | None:
    """Bytes of the elements, if the directory is as torch.save writes it for a tensor of less than 4 GiB.

    Else None: zipfile, which needs ten times as long, then says what there is.
    """
    count, place, last = _directory(end, length)
    stored = total = 0
    for _ in range(count):
        if not 0 <= place <= last - _ENTRY.size or end[place : place + 4] != b"PK\x01\x02":
            return None
        method, packed, unpacked, *lengths = _ENTRY.unpack_from(end, place)
        if method != zipfile.ZIP_STORED or packed != unpacked or unpacked >= 2**32 - 1:
            return None
        total += unpacked
        if b"/data/" in end[place + _ENTRY.size : place + _ENTRY.size + lengths[0]]:
            stored += unpacked
        place += _ENTRY.size + sum(lengths)
    return stored if place == last and total <= length else None


def _directory(end: bytes, length: int) -> tuple[int, int, int]:
    """How many entries a directory has, and where in `end` it begins and ends.

    It lies where both forms of what comes last say, so that all who read the archive find the same one.
    """
    last, before = len(end) - _LAST.size, length - len(end)
    if last < 0 or end[last : last + 4] != b"PK\x05\x06":
        raise ZipRecordsError("it is no zip archive as torch.save writes")
    count, size, start = said = _LAST.unpack_from(end, last)
    if end[last - 20 : last - 16] == b"PK\x06\x07":
        last -= _LAST_64.size
        if last < 0 or end[last : last + 4] != b"PK\x06\x06":
            raise ZipRecordsError("it is no zip archive as torch.save writes")
        count, size, start, itself = _LAST_64.unpack_from(end, last)
        fine = zip(said, (count, size, start), (2**16, 2**32, 2**32), strict=True)
        if itself != before + last or any(small not in (large, most - 1) for small, large, most in fine):
            raise ZipRecordsError("it says twice what it holds, and not the same")
    if start + size != before + last:
        raise ZipRecordsError("its directory is not where it says")
    return count, last - size, last


def _records(data: bytes, length: int) -> list[zipfile.ZipInfo]:
    _directory(data, length)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.infolist()
    except Exception as error:  # a damaged directory fails wherever zipfile happens to be
        raise ZipRecordsError(f"it is no zip archive as torch.save writes ({error})") from error


def _check_unpacked(records: list[zipfile.ZipInfo], length: int) -> None:
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ZipRecordsError("it is compressed, which torch.save never does")
    if (unpacked := sum(record.file_size for record in records)) > length:
        raise ZipRecordsError(f"it has {length} bytes and says that its records have {unpacked}")
