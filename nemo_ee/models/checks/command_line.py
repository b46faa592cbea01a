# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Keys of a training command, before Hydra reads them: each is known, or refused by name."""

import difflib
import inspect
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.override_parser.types import Override

from nemo_ee.errors import ConfigError, Fault
from nemo_ee.runtime.command_line import is_listed, listed_values, names_of, overrides_of, section_of

OF_NEMOS_BUILDER = ("cluster_type",)
"""Keys beside the sections that NeMo's trainer builder reads."""
OPTIONAL = ("model.optim.sched", "model.data.validation_ds", "model.early_exit", "model.seed")
"""Sections and keys that a run does without where they are taken away."""


def check_command_line(name: str, words: Sequence[str] | None = None) -> None:
    """Checks the names of all keys on a training script's command line.

    Hydra itself accepts any name behind a `+`, and says of a name that its file lacks no more than that.

    Args:
        name: of the file in conf/, `megatron_gpt_ee_` and what the script does.
        words: what stands behind the script's name; None takes the command line's.

    Raises:
        ConfigError: listing every key that is unknown, would mean nothing here, or needs a `+`.
    """
    listed = listed_values(name)
    faults = [
        fault
        for override in overrides_of(sys.argv[1:] if words is None else words)
        for fault in _faults(override, listed, name.removeprefix("megatron_gpt_ee_"), f"conf/{name}.yaml")
    ]
    if faults:
        raise ConfigError(*faults)


def _faults(override: Override, listed: dict[str, Any], script: str, file: str) -> Iterator[Fault]:
    section, _, key = override.key_or_group.partition(".")
    if override.is_delete():
        if is_listed(listed, override.key_or_group) and not override.key_or_group.startswith(OPTIONAL):
            rule = "the script reads it, and what the file says is no more than a default"
            remedy = "leave it out, or give it another value"
            yield Fault(f"~{override.key_or_group}", None, rule, remedy)
        return
    if isinstance(override.value(), list) and not override.is_add():
        if section_of(listed, override.key_or_group) is not None:
            rule = f"is a mapping in {file}, and Hydra puts no list in its place"
            words = f"~{override.key_or_group}", f"+{override.input_line.lstrip('+')}"
            yield Fault(override.key_or_group, override.value(), rule, f"set {shlex.join(words)}")
            return
    if section not in (*listed, *OF_NEMOS_BUILDER):
        nearest = difflib.get_close_matches(section, listed, 1)
        remedy = f"did you mean {nearest[0]}?" if nearest else f"leave it out; see {file}"
        yield Fault(override.key_or_group, override.value(), "unknown key", remedy)
    if section not in ("model", "trainer", "exp_manager") or not key:
        return
    for name, value in _leaves(key, override.value()):
        if not is_listed(listed, f"{section}.{name}"):
            yield from _of_unlisted(section, name, value, override, listed, script, file)


def _of_unlisted(
    section: str, name: str, value: Any, override: Override, listed: dict[str, Any], script: str, file: str
) -> Iterator[Fault]:
    """What a key that the file lacks has against it."""
    from nemo_ee.models.checks import key_names

    key, plus = f"{section}.{name}", override.is_add() or override.is_force_add()
    if section == "model":
        if plus and key_names.has_rule(name, script):
            return  # which looks at the value
        if (why := key_names.reason(name, script)) is not None:
            yield Fault(key, value, why, "leave it out")
            return
        known, sections = _known_of_model(), key_names.OPEN_SECTIONS
    else:
        known = _known_of(section)
        sections = known - {"checkpoint_callback_params"}  # e.g. the arguments of a logger
        known |= set(names_of(listed[section]))
    is_open = any(f"{name}.".startswith(f"{section}.") for section in sections)
    if (
        is_open or name in known or plus and name.startswith("early_exit.")
    ):  # of which read_early_exit knows all keys
        if not plus:
            rule = f"is not listed in {file}, and so is added with a +"
            yield Fault(key, value, rule, f"set {shlex.quote('+' + override.input_line)}")
        return
    above, _, last = name.rpartition(".")
    beside = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == above]
    nearest = [
        f"{section}.{above}.{other}".replace("..", ".")
        for other in difflib.get_close_matches(last, beside, 1)
    ]
    added = "" if not nearest or is_listed(listed, nearest[0]) else "+"
    remedy = f"did you mean {added}{nearest[0]}?" if nearest else f"see {file}"
    yield Fault(key, value, "unknown key", remedy)


def _known_of_model() -> set[str]:
    from nemo_ee.models.checks import key_names
    from nemo_ee.runtime import stand_ins

    stand_ins.enable()
    files = (listed_values(f"megatron_gpt_ee_{script}") for script in key_names.RULES)
    listed = {name for file in files for name in names_of(file["model"])}
    return listed | key_names.NEMO_MODEL_KEYS | key_names.megatron_keys()


def _known_of(section: str) -> set[str]:
    from nemo_ee.runtime import stand_ins

    stand_ins.enable()
    if section == "trainer":
        from lightning.pytorch import Trainer

        return set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    from nemo.utils.exp_manager import CallbackParams, ExpManagerConfig

    of_checkpoints = (
        f"checkpoint_callback_params.{name}" for name in inspect.signature(CallbackParams).parameters
    )
    return {*inspect.signature(ExpManagerConfig).parameters, *of_checkpoints}


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A key and its value; of a mapping, those below it."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _leaves(f"{name}.{key}", part)
    else:
        yield name, value
