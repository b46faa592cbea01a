# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Changes to other packages: what one is, and an import hook that makes it once its module has been executed."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TORCH = "torch 2.13.0"
LIGHTNING = "lightning 2.4.0"
MEGATRON = "megatron-core 0.13.1"
NEMO = "nemo-toolkit 2.4.1"


@dataclass(frozen=True)
class Patch:
    """One change to an upstream package.

    Attributes:
        module: the upstream module.
        name: the attribute of that module, dotted for a member of a class.
        upstream: package and release that the change was checked against.
        reason: why the symbol cannot stay as it is.
        replacement: called with the original (None where there is none); returns what takes its place, the
            original itself where nothing is missing.
        missing: True for a name that the module uses and may not have, because the import that defines it
            failed.
    """

    module: str
    name: str
    upstream: str
    reason: str
    replacement: Callable[[Any], Any]
    missing: bool = False

    @property
    def target(self) -> str:
        """The patched symbol as a dotted path."""
        return f"{self.module}.{self.name}"

    def apply(self) -> bool:
        """Replaces the symbol in its module, which must be imported; returns whether it was another before.

        Raises:
            AttributeError: the symbol does not exist; the installed release is not one this change was
                checked against.
        """
        owner: Any = sys.modules[self.module]
        *path, name = self.name.split(".")
        for part in path:
            owner = getattr(owner, part)
        if not self.missing and not hasattr(owner, name):
            raise AttributeError(f"{self.target} does not exist; nemo_ee was checked against {self.upstream}")
        original = getattr(owner, name, None)
        replacement = self.replacement(original)
        setattr(owner, name, replacement)
        return replacement is not original


class PatchingFinder(importlib.abc.MetaPathFinder):
    """Lets the usual finders locate a module that is to be patched, and patches it once it has been executed.

    Attributes:
        modules: the patches of every module, in the order in which they are applied.
        applied: dotted paths of the symbols that were replaced so far.
    """

    def __init__(self, patches: tuple[Patch, ...]):
        self.modules: dict[str, list[Patch]] = {}
        self.applied: list[str] = []
        for patch in patches:
            self.modules.setdefault(patch.module, []).append(patch)
        self._searching = False

    def apply(self, module: str) -> None:
        """Applies the patches of an imported module."""
        self.applied += [patch.target for patch in self.modules[module] if patch.apply()]

    def find_spec(self, fullname, path=None, target=None):
        """The module's spec, whose loader patches; None for a module without patches."""
        if fullname not in self.modules or self._searching:
            return None
        self._searching = True  # find_spec below asks every finder again, this one included
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_patch(module):
            execute(module)
            self.apply(fullname)

        spec.loader.exec_module = execute_and_patch  # this loader object serves this one module
        return spec
