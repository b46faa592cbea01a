# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Imports every module of nemo_ee where it is installed, with or without a GPU, and prints the versions that it met.

python scripts/requirements/check_imports.py

A package that is missing, or a module that cannot be imported, is an error. A version that was not tested is said.
"""

import importlib
import importlib.metadata
import pkgutil
import platform
import sys

from packaging.requirements import Requirement

from nemo_ee.runtime.script import user_errors

HARNESS = "nemo_ee.evaluation.harness."
"""Modules that need the extra lm-eval, which containers are not given."""
SHOWN = ("torch", "nemo-toolkit", "megatron-core", "lightning", "transformers", "transformer-engine", "apex")


def version_of(package: str) -> str | None:
    """Of an installed package; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements() -> list[Requirement]:
    """What nemo_ee and its server declare."""
    if version_of("nemo_ee") is None:
        sys.exit("error: nemo_ee is not installed; run pip install --no-deps --no-build-isolation -e .")
    declared = map(Requirement, importlib.metadata.requires("nemo_ee") or ())
    return [each for each in declared if not each.marker or each.marker.evaluate({"extra": "server"})]


def failures() -> list[str]:
    """The modules of nemo_ee that cannot be imported, with the reason."""
    import nemo_ee

    found = []
    for module in pkgutil.walk_packages(nemo_ee.__path__, "nemo_ee."):
        if module.name.startswith(HARNESS) and version_of("lm-eval") is None:
            continue
        try:
            importlib.import_module(module.name)
        except Exception as error:  # of whatever kind: a library's start-up code may raise anything
            found.append(f"{module.name}: {type(error).__name__}: {error}")
    return found


def main() -> None:
    """Prints versions; ends with status 1 and one line per fault."""
    print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in SHOWN:
        print(f"{package} {version_of(package) or 'is not installed'}")
    wanted = requirements()
    faults = [f"{each} is not installed" for each in wanted if version_of(each.name) is None]
    for each in wanted:
        version = version_of(each.name)
        if version and not each.specifier.contains(version, prereleases=True):
            print(f"not tested: {each.name} {version}; setup.py asks for {each.specifier}")
    with user_errors():
        faults += failures()
    if faults:
        sys.exit("\n".join(f"error: {fault}" for fault in faults))
    print("every module of nemo_ee can be imported")


if __name__ == "__main__":
    main()
