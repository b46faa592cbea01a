# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""First weights of exits that are about to be trained, with their backbone or on top of a frozen one."""

from collections.abc import Callable, Collection

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from nemo.utils import logging
from omegaconf import DictConfig

from nemo_ee.checkpoint.keys import exit_layer
from nemo_ee.config import EarlyExitConfig
from nemo_ee.modeling.first_weights import exit_init
from nemo_ee.modeling.gpt import EarlyExitGPTModel
from nemo_ee.models.checks.model_checks import read_early_exit
from nemo_ee.runtime import collective


class FirstWeights:
    """Which exits have weights already, and what the others begin with.

    Args:
        gpt: this stage's module.
        cfg: of the model.
        kept: exit layers that have their weights, or will have.

    Attributes:
        complete: all exits have come with a checkpoint, or have their first weights.
        kept: exit layers whose weights came with the checkpoint, and are trained further.
    """

    def __init__(self, gpt: EarlyExitGPTModel, cfg: DictConfig, kept: Collection[int] = ()):
        self.gpt, self.cfg, self.early_exit = gpt, cfg, gpt.early_exit
        self.complete, self.kept = False, frozenset(kept)

    @property
    def new(self) -> frozenset[int]:
        """Exit layers that get first weights."""
        return frozenset(self.early_exit.layers) - self.kept

    def take(self, here: Collection[int], saved: DictConfig) -> Collection[int]:
        """Exits of a checkpoint at the same layers, each with the same modules; all others begin anew.

        Args:
            here: exit layers that the checkpoint has weights of.
            saved: the checkpoint's configuration.
        """
        theirs, mine = read_early_exit(saved).heads if here else {}, self.early_exit.heads
        self.kept = frozenset(
            n for n in here if n in mine and n in theirs and theirs[n].has_weights_of(mine[n])
        )
        self.complete = not self.new
        if here:
            parts = {
                "trained further": self.kept,
                "begun anew": self.new,
                "left behind": frozenset(here) - self.kept,
            }
            told = ", ".join(f"{what}: {sorted(which)}" for what, which in parts.items() if which)
            logging.info(f"Exits of the checkpoint and of this run, by layer: {told}.")
        return self.kept

    def copies(self, mlp_source: Callable[[int], int]) -> ShardedStateDict:
        """What new exits copy from the backbone's checkpoint; see `exit_init.copy_sources`."""
        if self.complete or self.early_exit.init == "random":
            return {}
        copies = exit_init.copy_sources(self.gpt, self.cfg.num_layers, mlp_source)
        return {name: entry for name, entry in copies.items() if exit_layer(name) in self.new}

    def set(self, most_frequent: Callable[[int], torch.Tensor], fit: Callable[[], None]) -> None:
        """Sets what is missing, as `early_exit.init` says; copied weights have come with the checkpoint.

        Collective over the world.

        Args:
            most_frequent: gives [k] tokens for a shortlist of that many, the most frequent first; called on rank 0.
            fit: sets the closed form's weights.
        """
        config, std = self.early_exit, self.cfg.get("init_method_std", 0.02)
        new, seed = self.new, self.cfg.get("seed", 1234)
        random_std = std if config.init == "random" else None
        for size, layers in shortlist_sizes(config, new).items():
            shortlist = None if size is None else self._shortlist(size, most_frequent)
            exit_init.initialise_projections(self.gpt, shortlist, random_std, seed, layers)
        if config.init == "random":
            exit_init.initialise_randomly(self.gpt, std, seed, new)
        elif config.init == "copy":
            exit_init.start_branches_at_zero(self.gpt, new)
        else:
            fit()
        self.complete = True

    def _shortlist(self, size: int, most_frequent: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """[size] the kept tokens: those of exits that are there already, or the training text's most frequent."""
        if alike := shortlist_sizes(self.early_exit, self.kept).get(size):
            kept = [head.projection for n, head in self.gpt.exits.items() if int(n) in alike]
            mine = kept[0].token_ids.cpu() if kept else None
            return next(found for found in collective.gather(mine) if found is not None)
        return collective.on_first_rank(lambda: most_frequent(size))


def shortlist_sizes(config: EarlyExitConfig, layers: Collection[int]) -> dict[int | None, list[int]]:
    """Tokens of a shortlist, None for exits without -> those of the exit layers that have as many."""
    sizes: dict[int | None, list[int]] = {}
    for n in sorted(layers):
        head = config.heads[n]
        sizes.setdefault(head.shortlist_size if head.projection == "shortlist" else None, []).append(n)
    return sizes
