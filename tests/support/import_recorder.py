# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Who asks the import system for a package, whether it is there or not."""

import importlib.abc
import sys

MACHINERY = ("importlib", "_frozen_importlib", "pkgutil")
"""Modules whose frames stand between an import statement and its finders."""


class ImportRecorder(importlib.abc.MetaPathFinder):
    """A finder that finds nothing and notes which modules ask for some packages.

    Python asks it at every import of a package that is missing, and at the first of one that is there; also when
    it is asked whether there is one (``importlib.util.find_spec``).

    Args:
        packages: top-level names.

    Attributes:
        asked: names of the modules that asked.
    """

    def __init__(self, *packages: str):
        self.packages = packages
        self.asked: set[str] = set()

    def find_spec(self, fullname, path=None, target=None):
        """None, always: the next finder is asked."""
        if fullname.partition(".")[0] in self.packages:
            frame = sys._getframe(1)
            while frame.f_globals.get("__name__", "").startswith(MACHINERY):
                frame = frame.f_back
            self.asked.add(frame.f_globals["__name__"])
        return None
