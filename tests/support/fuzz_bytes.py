# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Coverage-guided fuzzing of the two parsers of bytes, headers of tar archives and of GGUF files, with atheris.

    python -m tests.support.fuzz_bytes tar|gguf SECONDS FOLDER

runs until the time is over, or to the first input that takes longer than a second of the processor's time, more memory
than `MOST_MIB`, or raises anything but one CheckpointError with the file's name. What is accepted is compared with
Python's tarfile or the package gguf. The corpus, and an input that fails (`crash-…`), are left in the folder.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_MIB = 2048
"""Of a process with torch and gguf, which is a third of it."""


def main(parser: str, seconds: str, folder: str) -> None:
    """Fuzzes one parser; see above."""
    import atheris

    home = Path(folder)
    corpus = home / "corpus"
    corpus.mkdir(parents=True)
    with atheris.instrument_imports(include=["nemo_ee.files.tar_headers", "nemo_ee.checkpoint.gguf.header"]):
        check, known = {"tar": tar, "gguf": gguf}[parser](home)
    for number, data in enumerate(known):
        (corpus / f"known{number}").write_bytes(data[: 2**16])
    options = [f"-max_total_time={seconds}", "-timeout=60", f"-rss_limit_mb={MOST_MIB}", "-max_len=65536"]
    files = [f"-artifact_prefix={home}/", str(corpus)]
    atheris.Setup([sys.argv[0], *options, "-print_final_stats=1", *files], check)
    atheris.Fuzz()


def timed(read: Callable[[Path], Any], path: Path) -> Any:
    """Reads a file within a second of the processor's time: on a busy machine the disk alone takes longer."""
    begin = time.process_time()
    try:
        return read(path)
    finally:
        assert time.process_time() - begin < 1


def tar(home: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    """A check of tar archives, and archives to begin with."""
    from nemo_ee.errors import CheckpointError
    from nemo_ee.files.tar_headers import TarArchive
    from tests.support.fuzz import refusal_of
    from tests.support.hostile_nemo import FILES
    from tests.support.tar_examples import HONEST, of_tarfile, sealed

    path = home / "m.nemo"

    def check(data: bytes) -> None:
        path.write_bytes(sealed(data) if len(data) % 2 == 0 else data)
        found, refused = refusal_of(lambda: timed(TarArchive, path), CheckpointError, path)
        if not refused:
            with found:
                members = {name: (each.is_folder, found.read(each)) for name, each in found.members.items()}
            assert members == of_tarfile(path), members

    known = list(HONEST)
    for file in FILES.values():
        file.write(path)
        if path.stat().st_size < 2**16:
            known.append(path.read_bytes())
    path.unlink()
    return check, known


def gguf(home: Path) -> tuple[Callable[[bytes], None], list[bytes]]:
    """A check of GGUF files, and files to begin with."""
    from gguf import GGUFReader

    from nemo_ee.checkpoint.gguf import header
    from nemo_ee.errors import CheckpointError
    from tests.support.fuzz import refusal_of
    from tests.support.gguf_examples import check_against_package, packed
    from tests.support.hostile_weights import GGUFS

    path = home / "m.gguf"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        found, refused = refusal_of(lambda: timed(header.read, path), CheckpointError, path)
        if not refused:
            check_against_package(found, GGUFReader(path))

    tensors = {"t": {"shape": [32, 2], "kind": 0}, "u": {"shape": [32, 3], "kind": 8}}
    honest = packed({"general.alignment": 32, "b": [1.5, 2.0], "c": ["x", "yz"], "d": True, "e": -5}, tensors)
    return check, [honest, *(data for data, _ in GGUFS.values())]


if __name__ == "__main__":
    main(*sys.argv[1:4])
