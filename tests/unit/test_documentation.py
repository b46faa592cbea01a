# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""README.md, docs/ and tutorials/: links lead somewhere, and what is named exists: files, modules, keys, messages."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from nemo_ee.runtime.commands import COMMANDS
from tests.support.script import ROOT

README = ROOT / "README.md"
TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "templates"),
    *TUTORIALS,
]
TROUBLES = ROOT / "docs" / "troubleshooting.md"
OLD_NAMES = {"docs/moved.md"}
"""Pages that name what is no more."""

LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|^    .*?$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"(?<![\w./-])(?:scripts|conf|nemo_ee)/[\w./*-]*\w")
MODULE = re.compile(r"(?<![\w./-])nemo_ee(?:\.[a-z]\w*)+")
COMMAND = re.compile(r"\b(?:scripts/(\w+)\.py|nemo-ee ([a-z][a-z-]*))((?:\\\n|[^\n`])*)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    """A page's own; of a notebook, its markdown, and between fences its cells of shell commands."""
    if page.suffix != ".ipynb":
        return page.read_text()
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(page.read_text())["cells"]]
    shown = [
        text if kind == "markdown" else f"```\n{text}\n```"
        for kind, text in cells
        if kind != "code" or text[:2] == "%%"
    ]
    return "\n\n".join(shown)


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub makes them."""
    prose = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> Iterator[str]:
    for link in LINK.findall(text_of(page)):
        if "://" in link:
            continue
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


def unknown_keys(text: str) -> Iterator[str]:
    """Keys on command lines of scripts with a file in conf/ that this file lacks."""
    for script, command, rest in COMMAND.findall(text):
        if command and command not in COMMANDS:
            yield f"nemo-ee {command}"
            continue
        script = script or COMMANDS[command]
        conf = ROOT / "conf" / f"{script}.yaml"
        if not conf.exists():
            continue
        known = yaml.safe_load(conf.read_text())
        arguments = re.split(r"\|\||&&| \| |\s#\s", rest.replace("\\\n", " "))[0]
        for word in shlex.split(arguments):
            key, equals, _ = word.partition("=")
            if (
                equals
                and not key.startswith("--")
                and not has_key(known, key.lstrip("+"), key.startswith("+"))
            ):
                yield f"{script}.py: {key}"


def has_key(values: object, key: str, added: bool) -> bool:
    """Whether a section has a key; of one that is `added`, whether it has the section that the key goes into."""
    first, _, rest = key.partition(".")
    if not isinstance(values, dict) or first not in values:
        return added and not rest
    return not rest or has_key(values[first] or {}, rest, added)


def sources() -> str:
    """All that is said by the code, with the parts of a message that stand on several lines put together."""
    files = [
        *(ROOT / "nemo_ee").rglob("*.py"),
        *(ROOT / "scripts").rglob("*.py"),
        *(ROOT / "scripts").rglob("*.sh"),
    ]
    return re.sub(r"[\"']\s*\n\s*f?[\"']", "", "\n".join(file.read_text() for file in files))


def messages() -> list[str]:
    """The lines that the page says to come up, but for its last table."""
    lines = TROUBLES.read_text().partition("## Without an error")[0].splitlines()
    return [line.split("`")[1] for line in lines if line.startswith("| `")]


def fixed_parts(message: str) -> list[str]:
    """What of a message is the same each time, between values, keys and the punctuation that joins them."""
    return [part for part in re.split(r"…|=|[:;] ", message) if " " in part.strip()]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    assert [*broken_links(page)] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_is_named_exists(page):
    if name(page) in OLD_NAMES:
        return
    text = text_of(page)
    assert [file for file in FILE.findall(text) if not [*ROOT.glob(file)]] == []
    modules = [ROOT / module.replace(".", "/") for module in MODULE.findall(text)]
    assert [path for path in modules if not path.is_dir() and not path.with_suffix(".py").exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_keys_of_commands_exist(page):
    assert [*unknown_keys("\n".join(CODE.findall(text_of(page))))] == []


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 170


def test_the_readme_leads_to_every_page():
    linked = {link.partition("#")[0] for link in LINK.findall(README.read_text())}
    pages = {name(page) for page in [*(ROOT / "docs").glob("*.md"), *TUTORIALS]} - OLD_NAMES
    assert pages - linked == set()


def test_messages_are_those_of_the_code():
    assert len(messages()) > 40
    said = sources()
    assert [message for message in messages() if not fixed_parts(message)] == []
    assert [part for message in messages() for part in fixed_parts(message) if part.strip() not in said] == []
