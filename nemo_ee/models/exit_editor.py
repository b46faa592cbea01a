# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Adds, removes and moves exits of a checkpoint; those that stay keep their weights."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from nemo_ee.checkpoint import archive, run_keys
from nemo_ee.checkpoint.keys import EXITS_PREFIX
from nemo_ee.errors import ConfigError, Fault
from nemo_ee.modeling.first_weights import exit_init
from nemo_ee.models.checks.model_checks import from_checkpoint
from nemo_ee.models.first_weights import FirstWeights
from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel


class EditedExitsModel(MegatronGPTEarlyExitModel):
    """Restores a checkpoint with other exits than it has: `sources` says where each one's weights are.

    Attributes:
        sources: exit layer -> the checkpoint's exit whose weights it takes; others are new.
    """

    sources: Mapping[int, int]
    leaves_exits = True

    def __init__(self, cfg: DictConfig, trainer: Trainer):
        super().__init__(cfg, trainer)
        self.first_weights = FirstWeights(self.gpt, self.cfg, self.sources)

    def exits_to_take(self, here: Collection[int], saved: DictConfig) -> Collection[int]:
        """Those that have a source."""
        return tuple(self.sources)

    def state_to_restore(self, taken: Collection[int]) -> ShardedStateDict:
        """Exits under the keys that their sources have in the checkpoint."""
        state = {}
        for name, entry in super().state_to_restore(taken).items():
            if name.startswith(EXITS_PREFIX):
                layer, _, rest = name.removeprefix(EXITS_PREFIX).partition(".")
                entry.key = f"{EXITS_PREFIX}{self.sources[int(layer)]}.{rest}"
            state[name] = entry
        return state

    def copies_to_restore(self) -> ShardedStateDict:
        """What new exits copy from the backbone."""
        return self.first_weights.copies(lambda layer: layer) if self.early_exit.init == "copy" else {}

    def initialise_new_exits(self) -> None:
        """First weights of new exits: random, or the rest of a copy.

        Raises:
            ConfigError: a new shortlist, with no exit to take its tokens from.
        """

        def no_text(_: int) -> Tensor:
            rule = "a new shortlist needs the text whose tokens it keeps, which tuning has"
            remedy = "use projection=tied or untied, or scripts/megatron_gpt_ee_tuning.py"
            raise ConfigError(Fault("early_exit.head.projection", "shortlist", rule, remedy))

        new = self.first_weights.new
        if new:
            self.first_weights.set(no_text, lambda: exit_init.start_branches_at_zero(self.gpt, new))


def edit_exits(
    path: str | os.PathLike,
    output: str | os.PathLike,
    layers: Sequence[int],
    moves: Mapping[int, int],
    trainer: Trainer,
    early_exit: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> EditedExitsModel:
    """Writes a checkpoint with other exits. One process.

    Args:
        path: a full `.nemo`, with exits or without.
        output: the `.nemo` to write.
        layers: the exits that it shall have; without any it becomes a plain checkpoint again.
        moves: exit layer of `path` -> the layer among `layers` that takes its weights.
        trainer: of one process.
        early_exit: further keys of the section, e.g. `init` of new exits; `head` where `path` has no exits, or a head
            for each, and new ones come.
        overwrite: replace `output`.

    Raises:
        ConfigError, CheckpointError: before the model is built.
    """
    if Path(output).exists() and not overwrite:
        raise ConfigError(Fault("output_path", output, "exists", "choose another, or set overwrite=true"))
    saved = archive.read_config(path)
    _check_layers(layers, early_exit or {})
    sources = _sources(saved, layers, moves)
    section = {**_section(saved), **(early_exit or {}), "layers": sorted(layers)}
    if isinstance(section.get("head"), list) and "head" not in (early_exit or {}):
        section["head"] = _moved_heads(section["head"], saved, sorted(layers), sources)
    config = EditedExitsModel.add_exits(_one_process(saved), section if layers else None)
    kind = type("EditedExits", (EditedExitsModel,), {"sources": sources})
    with from_checkpoint(path):
        model = kind.restore_from(str(path), override_config_path=config, trainer=trainer)
    if layers:
        model.initialise_new_exits()
    else:
        with open_dict(model.cfg):
            model.cfg.pop("early_exit")
    model.save_to(str(output))
    return model


def _check_layers(layers: Any, early_exit: Mapping[str, Any]) -> None:
    faults = []
    if not isinstance(layers, Sequence) or not all(type(n) is int for n in layers):
        faults.append(
            Fault("layers", layers, "must be a list of layers", "write layers=[3,6], or layers=[] for none")
        )
    elif not layers:
        rule, remedy = "layers=[] leaves no exit that would have it", "leave it out"
        faults += [
            Fault(f"early_exit.{key}", value, rule, remedy)
            for key, value in early_exit.items()
            if key != "init"
        ]
    if faults:
        raise ConfigError(*faults)


def _one_process(saved: DictConfig) -> DictConfig:
    """A checkpoint's configuration for one process; what it says of precision is what its weights have."""
    config = run_keys.without_layout(saved)
    with open_dict(config):
        config.update(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
        config.update({key: saved[key] for key in ("precision", "megatron_amp_O2") if key in saved})
    return config


def _section(config: DictConfig) -> dict[str, Any]:
    """The section without what is said per exit."""
    section = OmegaConf.to_container(config.get("early_exit") or OmegaConf.create({}), resolve=True)
    for part, key in (("tuning", "loss_weights"), ("training", "loss_weights"), ("inference", "exits")):
        if section.get(part):
            section[part][key] = None
    if isinstance((section.get("inference") or {}).get("threshold"), list):
        section["inference"].pop("threshold")
    return section


def _moved_heads(
    heads: list[Any], saved: DictConfig, layers: Sequence[int], sources: Mapping[int, int]
) -> list[Any]:
    """A checkpoint's list of heads for its edited exits."""
    of = dict(zip(saved.early_exit.layers, heads, strict=True))
    if new := [n for n in layers if n not in sources]:
        rule = f"the checkpoint has a head for each exit, and none for {new}"
        remedy = f"give a list of {len(layers)}, one for each of {list(layers)}"
        raise ConfigError(Fault("early_exit.head", None, rule, remedy))
    return [of[sources[n]] for n in layers]


def _sources(config: DictConfig, layers: Sequence[int], moves: Mapping[int, int]) -> dict[int, int]:
    present = list((config.get("early_exit") or {}).get("layers") or [])
    faults = []
    for old, new in moves.items():
        if old not in present:
            remedy = f"use one of {present}" if present else "leave moves empty"
            faults.append(Fault(f"moves.{old}", new, "the checkpoint has no such exit", remedy))
        if new not in layers:
            faults.append(Fault(f"moves.{old}", new, f"not one of layers={list(layers)}", "add it there"))
    if len(set(moves.values())) < len(moves):
        faults.append(Fault("moves", dict(moves), "two exits move to one layer", "move one of them"))
    if faults:
        raise ConfigError(*faults)
    stay = {n: n for n in layers if n in present and n not in moves}
    return {**stay, **{new: old for old, new in moves.items()}}
