# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Imports point inward, from room to room, in no circle; modeling, training and decoding know no NeMo."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LICENCE = "# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.\n"
CATCH_ALL_NAMES = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}

LIBRARIES = {"torch", "numpy", "megatron"}
LEVELS = [
    {"errors": set()},
    {"schema": set(), "files": {"yaml"}},
    {"head_config": set()},
    {"config": {"omegaconf"}, "runtime": None},
    {"modeling": LIBRARIES},
    {"decoding": LIBRARIES | {"numba", "llvmlite", "flash_attn", "tqdm"}, "training": LIBRARIES},
    {"data": None},
    {"generation": None},
    {"checkpoint": None},
    {"preprocessing": None},
    {"models": None},
    {"report": None},
    {"export": None},
    {"running": None},
    {"evaluation": None},
    {"calibration": None, "server": None, "tuning_text": None},
]
"""Rooms from the inmost on, and what each may import of other packages (None: anything). A room imports itself and
those before it; `LATE` names what a function may import later all the same."""
LATE = {
    ("runtime", "checkpoint"),  # NeMo asks for a tokenizer through what is patched
    ("checkpoint", "models"),  # a connector and a converter make models
}
KERNELS = {
    "nemo_ee.decoding.cpu.kernels",
    "nemo_ee.runtime.upstream.numba_cache",
    "numba",
    "llvmlite",
    "numpy",
}

EXTRAS = {
    "nemo_ee/server/": {"fastapi", "starlette", "uvicorn", "prometheus_client", "nemo_ee.server"},
    "nemo_ee/evaluation/harness/": {"lm_eval", "datasets", "nemo_ee.evaluation.harness"},
}
"""Folder -> what it alone may import: the packages of its extra, and itself."""


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_modules(source: str, package: list[str]) -> set[str]:
    """Dotted names of all that a module of `package` imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names |= {".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names}
    return names


def outside(names: set[str], allowed: set[str]) -> set[str]:
    """Those names that lie in none of the allowed modules and not in the standard library."""
    allowed = allowed | set(sys.stdlib_module_names)
    return {name for name in names if not any(f"{name}.".startswith(f"{module}.") for module in allowed)}


def room(name: str) -> str:
    """Of a dotted name in the package."""
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_imports_point_inward(level):
    inner = {name for names in LEVELS[:level] for name in names}
    for own, libraries in LEVELS[level].items():
        members = [path for path in python_files("nemo_ee") if place(path).startswith(f"nemo_ee/{own}")]
        assert members, own
        for path in members:
            names = imported_modules(path.read_text(), list(path.relative_to(ROOT).parts[:-1]))
            rooms = {room(name) for name in names if name.startswith("nemo_ee.")}
            outward = rooms - inner - {own, "__version__"}
            assert {(own, name) for name in outward} <= LATE, place(path)
            if libraries is not None:
                assert outside(names, libraries | {"nemo_ee"}) == set(), place(path)


def test_every_module_has_a_room():
    rooms = {name for names in LEVELS for name in names}
    assert {place(path).split("/")[1].removesuffix(".py") for path in python_files("nemo_ee")} == rooms | {
        "__init__"
    }


def test_compiled_functions_know_numba_alone():
    for path in python_files("nemo_ee/decoding/cpu/kernels"):
        names = imported_modules(path.read_text(), list(path.relative_to(ROOT).parts[:-1]))
        assert outside(names, KERNELS) == set(), place(path)


def test_modules_import_in_no_circle():
    """Of what is imported at the top of modules; what a function imports comes later."""
    top: dict[str, set[str]] = {}
    for path in python_files("nemo_ee"):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        body = ast.parse(path.read_text()).body
        statements = [ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = imported_modules("\n".join(statements), parts[:-1])
        top[".".join(parts).removesuffix(".__init__")] = names
    left = {
        module: {name if name in top else name.rpartition(".")[0] for name in names} & top.keys()
        for module, names in top.items()
    }
    assert left["nemo_ee.training.exit_loss"] >= {"nemo_ee.modeling.projection", "nemo_ee.config"}
    while free := {module for module, names in left.items() if not names & left.keys()}:
        left = {module: names for module, names in left.items() if module not in free}
    assert {module: names & left.keys() for module, names in left.items()} == {}


@pytest.mark.parametrize("folder", EXTRAS)
def test_everything_else_runs_without_the_packages_of_an_extra(folder):
    for path in python_files("nemo_ee"):
        if place(path) == "nemo_ee/runtime/upstream/hugging_face_datasets.py":  # does where it is broken
            continue
        names = imported_modules(path.read_text(), list(path.relative_to(ROOT).parts[:-1]))
        inside = {name for name in names if any(f"{name}.".startswith(f"{each}.") for each in EXTRAS[folder])}
        assert not inside or place(path).startswith(folder), place(path)


def test_nothing_imports_what_may_be_missing():
    """megatron-core and NeMo try the imports of Apex and Transformer Engine; the package asks them what they found."""
    for path in python_files("nemo_ee", "scripts"):
        names = imported_modules(path.read_text(), list(path.relative_to(ROOT).parts[:-1]))
        packages = {name.partition(".")[0] for name in names}
        assert not packages & {"apex", "amp_C", "transformer_engine", "transformer_engine_torch"}, place(path)


def test_the_package_imports_neither_scripts_nor_tests():
    for path in python_files("nemo_ee"):
        names = imported_modules(path.read_text(), list(path.relative_to(ROOT).parts[:-1]))
        assert not {name for name in names if name.startswith(("scripts.", "tests."))}, place(path)


def test_nested_relative_and_lookalike_imports_are_seen():
    source = """
import torch.nn, torchvision
def f():
    from nemo.utils import logging
    from ..models import tuning
    from nemo_ee import models
    from . import ridge
"""
    names = imported_modules(source, ["nemo_ee", "modeling"])
    outward = {"torchvision", "nemo.utils.logging", "nemo_ee.models.tuning", "nemo_ee.models"}
    assert outside(names, {"torch", "nemo_ee.modeling"}) == outward


@pytest.mark.parametrize(
    "module",
    [
        "nemo_ee",
        "nemo_ee.errors",
        "nemo_ee.config",
        "nemo_ee.files.output",
        "nemo_ee.files.scratch",
        "nemo_ee.runtime.stand_ins",
    ],
)
def test_light_modules_load_nothing_heavy(module):
    heavy = "{'torch', 'nemo', 'megatron', 'lightning', 'transformers'}"
    code = f"import {module}, sys; print(*sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_files_are_small_licensed_and_named_for_what_they_hold():
    files = python_files("nemo_ee", "scripts", "tests")
    for path in files:
        assert len(path.read_text().splitlines()) <= (500 if place(path).startswith("tests/") else 400), (
            place(path)
        )
    assert [place(path) for path in files if not path.read_text().startswith(LICENCE)] == []
    assert [place(path) for path in files if path.name in CATCH_ALL_NAMES] == []


def test_folders_are_small():
    for folder in {path.parent for path in python_files("nemo_ee", "scripts")}:
        assert sum(path.is_file() and path.name != "__init__.py" for path in folder.iterdir()) <= 20, folder


def test_files_are_written_and_scratch_folders_made_in_one_way():
    """What else would take a file's place in one step, or make a folder that a killed process leaves behind."""
    others = {"os.replace", "os.rename", "os.renames", "shutil.move"}
    for path in python_files("nemo_ee", "scripts"):
        if place(path).startswith("nemo_ee/files/"):
            continue
        tree = ast.parse(path.read_text())
        names = imported_modules(path.read_text(), list(path.relative_to(ROOT).parts[:-1]))
        assert not {name for name in names if name.partition(".")[0] == "tempfile"}, place(path)
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not called & others, place(path)
