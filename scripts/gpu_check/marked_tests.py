# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The tests marked `gpu`. One that is skipped counts as failed: here is the GPU that it waited for."""

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from result import Result

if TYPE_CHECKING:
    from part import Settings

ROOT = Path(__file__).resolve().parents[2]


def check(settings: "Settings", result: Result) -> None:
    """Runs them in one process of pytest; only files that have the mark are imported."""
    files = [str(path) for path in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in path.read_text()]
    report = settings.work / "marked_tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-rs", "--slow"]
    command += ["--durations=10", f"--junitxml={report}", *files]
    done = subprocess.run(command, cwd=ROOT) if files else None
    cases = list(ElementTree.parse(report).getroot().iter("testcase")) if report.exists() else []
    unwell = [(case, outcome) for case in cases for outcome in case if outcome.tag in OUTCOMES]
    result.lines.append(("tests marked gpu", f"{len(cases) - len(unwell)} of {len(cases)} passed"))
    for case, outcome in unwell:
        name = f"{case.get('classname')}::{case.get('name')}"
        result.faults.append(f"{name} {OUTCOMES[outcome.tag]}: {reason(outcome)}")
    if not cases:
        result.faults.append("no test ran")
    elif done is not None and done.returncode != 0 and not unwell:
        result.faults.append(f"pytest ended with {done.returncode}; see its output")


def reason(outcome: ElementTree.Element) -> str:
    """What pytest marks with E, of which the message has the first line alone, shortened; in 600 characters."""
    marked = [line[1:].strip() for line in (outcome.text or "").splitlines() if line.startswith("E ")]
    said = marked or (outcome.get("message") or "").strip().splitlines()[:1] or ["no message"]
    return " ".join(said)[:600]


OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "was skipped"}
