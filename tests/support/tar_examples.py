# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Strategies of tar archives: blocks with right checksums that say what is not so, and archives of tarfile's own."""

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import yaml
from hypothesis import strategies as st

from tests.support.hostile_nemo import GOOD, header, padded, pax, record
from tests.support.mutations import spoilt_bytes

CONFIG = yaml.safe_dump(GOOD).encode()
MAGICS = (b"ustar\x0000", b"ustar  \0", bytes(8))
NAMES = (
    b"model_config.yaml", b"./model_config.yaml", b"model_weights/", b"model_weights/common.pt", b"model_weights",
    b"a", b"a/b", b"a/", b"./a", b"a//b", b"./", b".", b"../a", b"/a", b"a/../b", b"", b"caf\xc3\xa9", b"\xff",
    b"a\\b", b"n" * 100, b"x " * 20, b" a", b"a/./b",
)  # fmt: skip
KINDS = (
    b"0",
    b"0",
    b"0",
    b"\0",
    b"5",
    b"5",
    b"1",
    b"2",
    b"7",
    b"S",
    b"L",
    b"K",
    b"x",
    b"g",
    b"V",
    b"D",
    b"Z",
)
names = st.sampled_from(NAMES) | st.binary(max_size=12)
sizes = (
    st.integers(0, 2000)
    | st.integers(0, 8**11 - 1)
    | st.sampled_from((b"", b" 7 ", b"0x10", b"-1", b"00000000000 ", b"777777777777", b"1_0", b"+1"))
    | st.integers(-(2**70), 2**70).map(lambda n: (n % 2**95 | 1 << 95).to_bytes(12, "big"))
)


@st.composite
def _records(draw: Callable) -> bytes:
    """Records of a PAX header."""
    made = b""
    for _ in range(draw(st.integers(0, 3))):
        keys = st.sampled_from(
            (
                b"path",
                b"path",
                b"size",
                b"mtime",
                b"linkpath",
                b"hdrcharset",
                b"GNU.sparse.map",
                b"comment",
                b"",
            )
        )
        texts = (
            names
            | st.integers(-5, 3000).map(lambda n: b"%d" % n)
            | st.sampled_from((b"BINARY", b"1e3", b"9" * 30))
        )
        made += record(draw(keys), draw(texts))
    if draw(st.integers(0, 4)) == 0:
        made = draw(spoilt_bytes([made], [b" ", b"=", b"\n", b"0"], most=2))
    return made


@st.composite
def _part(draw: Callable) -> bytes:
    """A header with what follows it."""
    magic, name, kind = (draw(st.sampled_from(each)) for each in (MAGICS, NAMES, KINDS))
    if draw(st.integers(0, 3)) == 0:
        name = draw(names)
    content = draw(st.binary(max_size=1200) | st.just(CONFIG))
    if kind in b"xg":
        return pax(draw(_records()), kind)
    if kind in b"LK":
        text = draw(names) + b"\0"
        return header(b"././@LongLink", len(text), kind, magic) + padded(text)
    if kind == b"5" or name.endswith(b"/"):
        content = b""
    size: int | bytes = len(content)
    if draw(st.integers(0, 5)) == 0:
        size = draw(sizes)
    return header(name, size, kind, magic) + padded(content)


@st.composite
def built(draw: Callable) -> bytes:
    """An archive of blocks."""
    parts = draw(st.lists(_part(), max_size=5))
    if draw(st.integers(0, 4)):
        parts.insert(
            draw(st.integers(0, len(parts))), header(b"model_config.yaml", len(CONFIG)) + padded(CONFIG)
        )
    end = draw(
        st.sampled_from((bytes(1024), bytes(1024), bytes(512), b"", bytes(10_240), bytes(512) + b"x" * 512))
    )
    whole = b"".join(parts) + end
    return gzip.compress(whole, 1) if draw(st.integers(0, 4)) == 0 else whole


def honest(form: int, name: str = "model_weights/common.pt", zipped: bool = False) -> bytes:
    """An archive as Python's tarfile writes it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz" if zipped else "w", format=form) as tar:
        folder = tarfile.TarInfo("./model_weights")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for each, content in (("./model_config.yaml", CONFIG), (name, b"weights" * 99), ("./empty", b"")):
            info = tarfile.TarInfo(each)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


HONEST = [
    honest(form, name, zipped)
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    for name, zipped in (("model_weights/common.pt", False), ("model_weights/" + "n" * 140, True))
    if len(name) < 100 or form != tarfile.USTAR_FORMAT
]
TOKENS = (*NAMES, header(b"a", 3) + padded(b"abc"), pax(record(b"path", b"b")), bytes(512))
archives = (
    built()
    | spoilt_bytes(HONEST, TOKENS)
    | spoilt_bytes(HONEST, TOKENS, most=3).map(lambda data: sealed(data))
)


def sealed(data: bytes) -> bytes:
    """The same blocks; those with the mark of a header have the right checksum."""
    made = bytearray(data)
    for at in range(0, len(made) - 511, 512):
        if made[at + 257 : at + 262] == b"ustar":
            made[at + 148 : at + 156] = b" " * 8
            made[at + 148 : at + 156] = b"%06o\0 " % sum(made[at : at + 512])
    return bytes(made)


def of_tarfile(path: Path) -> dict[str, tuple[bool, bytes]]:
    """Name -> whether it is a folder, and its content."""
    found = {}
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            assert member.isreg() or member.isdir(), member
            file = tar.extractfile(member)
            found[str(PurePosixPath(member.name))] = (member.isdir(), file.read() if file else b"")
    return found
