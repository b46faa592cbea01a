# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""docs/architecture.md says where things are decided; files and functions that it names there exist."""

import ast
import re
from collections.abc import Iterable
from pathlib import Path

from tests.support.script import ROOT

PAGE = ROOT / "docs" / "architecture.md"
FILE = re.compile(r"`([\w/]+\.py)`")
FUNCTION = re.compile(r"`([\w.]+)`")


def table(page: Path, title: str) -> list[list[str]]:
    """Rows of the table below a heading, without its head."""
    text = page.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def names_in(modules: Iterable[Path]) -> set[str]:
    """Functions and classes of modules, and methods as `Class.method`."""
    found = set()
    for module in modules:
        for node in ast.parse(module.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            if isinstance(node, ast.ClassDef):
                found |= {
                    f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)
                }
    return found


def test_where_it_is_decided():
    rows = table(PAGE, "Where is it decided")
    assert len(rows) >= 10
    for question, place, names in rows:
        files = FILE.findall(place)
        assert files and question.endswith("?"), question
        assert set(FUNCTION.findall(names)) - names_in(ROOT / "nemo_ee" / file for file in files) == set(), (
            question
        )
        assert FUNCTION.findall(names), question


def test_rooms_are_those_of_the_package():
    said = set(re.findall(r"`(\w+)(?:/|\.py)`", "\n".join(row[0] for row in rooms())))
    modules, folders = (ROOT / "nemo_ee").glob("[!_]*.py"), (ROOT / "nemo_ee").glob("*/__init__.py")
    package = {path.stem for path in modules} | {path.parent.name for path in folders}
    assert said == package


def rooms() -> list[list[str]]:
    """Of the page's first table."""
    lines = PAGE.read_text().partition("| room |")[2].splitlines()[2:]
    return [line.strip("|").split("|") for line in lines[: lines.index("")]]
