# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A class is made of few others, and their order means nothing: what several would do at one hook, objects do."""

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

MOST = 2
"""Bases of ours, beside those of other packages."""
CONSTRUCTOR = "__init__"
"""What bases may share: each calls the next one's."""


@dataclass(frozen=True)
class Kind:
    """A class as its source has it: where names of other packages are found, bases are left out."""

    bases: tuple[str, ...]
    members: frozenset[str]


def classes_of(module: str, source: str) -> dict[str, Kind]:
    """Dotted name -> class, for those at the top of a module."""
    tree, found, known = ast.parse(source), {}, {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nemo_ee"):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.ClassDef):
            name = known[node.name] = f"{module}.{node.name}"
            bases = [known.get(ast.unparse(base).partition("[")[0]) for base in node.bases]
            members = {each.name for each in node.body if isinstance(each, ast.FunctionDef | ast.ClassDef)}
            for each in node.body:
                targets = each.targets if isinstance(each, ast.Assign) else [getattr(each, "target", None)]
                members |= {target.id for target in targets if isinstance(target, ast.Name)}
            found[name] = Kind(tuple(filter(None, bases)), frozenset(members))
    return found


def faults_of(kinds: dict[str, Kind]) -> list[str]:
    def members(
        name: str,
    ) -> set[str]:  # inherited ones, too; none of a name that is another package's after all
        kind = kinds.get(name, Kind((), frozenset()))
        return set(kind.members).union(*map(members, kind.bases))

    faults = []
    for name, kind in kinds.items():
        if len(kind.bases) > MOST:
            faults.append(f"{name} has {len(kind.bases)} bases")
        for number, base in enumerate(kind.bases):
            for other in kind.bases[number + 1 :]:
                both = (members(base) & members(other)) - {CONSTRUCTOR}
                faults += [f"{name}: {member} of two bases" for member in sorted(both)]
    return faults


def test_classes_have_few_bases_of_ours_and_these_share_no_hook():
    kinds: dict[str, Kind] = {}
    for path in sorted((ROOT / "nemo_ee").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        kinds |= classes_of(module, path.read_text())
    models = "nemo_ee.models.megatron_gpt_"
    training = f"{models}ee_training_model.MegatronGPTEETrainingModel"
    assert kinds[f"{models}ee_pretraining_model.MegatronGPTEEPretrainingModel"].bases == (training,)
    assert kinds[f"{models}ee_tuning_model.MegatronGPTEETuningModel"].bases == (training,)
    assert len(kinds[f"{models}early_exit_model.MegatronGPTEarlyExitModel"].bases) == MOST
    assert faults_of(kinds) == []


def test_too_many_bases_and_shared_hooks_are_seen():
    source = """
from nemo_ee.x import First
from nemo import Theirs
class Second(First):
    batches = 1
    def setup(self): ...
class Third(Theirs):
    def setup(self): ...
class Heir(Third):
    batches: int = 2
class Fine(Second, dict, Theirs): ...
class Shared(Second, Heir): ...
class Many(First, Second, Third): ...
"""
    assert faults_of(classes_of("m", source)) == [
        "m.Shared: batches of two bases",
        "m.Shared: setup of two bases",
        "m.Many has 3 bases",
        "m.Many: setup of two bases",
    ]
