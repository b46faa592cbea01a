# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""CONTRIBUTING.md names files and functions that exist, and CITATION.cff this version."""

import re
import tomllib

import pytest
import yaml

from nemo_ee import __version__
from tests.support.script import ROOT
from tests.unit.test_architecture import FUNCTION, names_in, table

PAGE = ROOT / "CONTRIBUTING.md"
GUIDES = re.findall(r"^## (Add .+)$", PAGE.read_text(), re.MULTILINE)
PLACE = re.compile(r"`([\w./]+)`")


@pytest.mark.parametrize("title", GUIDES)
def test_guides_name_what_exists(title):
    rows = table(PAGE, title)
    assert len(rows) >= 3
    for step, places, names in rows:
        files = PLACE.findall(places)
        assert files and [file for file in files if not (ROOT / file).exists()] == [], step
        modules = [ROOT / file for file in files if file.endswith(".py")]
        assert set(FUNCTION.findall(names)) - names_in(modules) == set(), step


def test_what_can_be_added():
    assert GUIDES == ["Add a head kind", "Add a confidence rule", "Add a base model"]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["authors"] == [{"name": "The nemo_ee authors"}]
    cited = {each["url"].rpartition("/")[2] for each in citation["references"]}
    assert cited == {"2312.04916", "2402.00518"}
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{__version__}] - {citation['date-released']}" in changes
    assert f"dist/nemo_ee-{__version__}-py3-none-any.whl" in (ROOT / "docs" / "install.md").read_text()
    backend = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["build-backend"]
    assert backend == "setuptools.build_meta"  # what tests build wheels with
