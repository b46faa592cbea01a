# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""setup.py, the pinned environments and what a container is given agree."""

from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PINS = {"3.11": "requirements/constraints.txt", "3.12": "requirements/constraints-3.12.txt"}
"""The list of each Python that is tested."""


def read(name: str) -> dict[str, Requirement]:
    lines = (ROOT / "scripts" / name).read_text().splitlines()
    found = [Requirement(line) for line in lines if not line.startswith("#")]
    assert len({canonicalize_name(each.name) for each in found}) == len(found), "each package once"
    return {canonicalize_name(each.name): each for each in found}


@pytest.fixture(scope="module")
def declared() -> dict:
    """What setup.py hands to setuptools."""
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", given.update)
        path = ROOT / "setup.py"
        exec(compile(path.read_text(), path, "exec"), {"__file__": str(path), "__name__": "setup"})
    return given


def of(lines: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


@pytest.mark.parametrize("python", PINS)
def test_what_is_declared_admits_what_was_tested(python, declared):
    extras = declared["extras_require"]
    more = [each for name in ("server", "lm-eval", "dev") for each in extras[name]]
    wanted, pins = of(declared["install_requires"] + more), read(PINS[python])
    assert SpecifierSet(declared["python_requires"]).contains(f"{python}.0")
    for name, requirement in wanted.items():
        ((pin,),) = [pins[name].specifier]
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), name
    direct = read("requirements/requirements.txt")
    assert set(wanted) - set(direct) <= {"numba"}, "comes with NeMo"
    for name, requirement in direct.items():
        assert name in pins and not requirement.specifier, "its version stands in one place for each Python"


def test_torch_and_megatron_core_are_bounded_by_what_was_tested(declared):
    wanted, pins = of(declared["install_requires"]), [read(name) for name in PINS.values()]
    for name, outside in {"torch": ("2.6.0", "2.14.0"), "megatron-core": ("0.12.3", "0.14.0")}.items():
        assert len({str(each[name]) for each in pins}) == 2, "the oldest and the newest"
        assert not any(map(wanted[name].specifier.contains, outside))


def test_a_container_is_given_all_that_neither_it_nor_nemo_declares(declared):
    extras = declared["extras_require"]
    stack = "torch nemo-toolkit megatron-core lightning hydra-core omegaconf numpy transformers".split()
    wanted = of(declared["install_requires"] + extras["server"])
    given = read("requirements/requirements-container.txt")
    assert {name: str(each) for name, each in wanted.items() if name not in stack} == {
        name: str(each) for name, each in given.items()
    }
