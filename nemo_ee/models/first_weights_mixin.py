# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""First weights of exits that are about to be trained, with their backbone or on top of a frozen one."""

from collections.abc import Collection

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from nemo.utils import logging
from omegaconf import DictConfig

from nemo_ee.checkpoint.keys import exit_layer
from nemo_ee.data.token_counts import ENOUGH_TOKENS, token_counts
from nemo_ee.modeling.first_weights import exit_init
from nemo_ee.models.checks.model_checks import read_early_exit
from nemo_ee.runtime import collective


class FirstWeightsMixin:
    """To be put before the NeMo model class.

    Attributes:
        exits_initialised: all exits have come with a checkpoint, or have their first weights.
        kept_exits: exit layers whose weights came with the checkpoint, and are trained further.
    """

    leaves_exits = True
    exits_initialised: bool = False
    kept_exits: frozenset[int] = frozenset()

    def setup(self, stage: str | None = None) -> None:
        """NeMo's set-up; then, for a fit that does not resume, the exits' first weights."""
        super().setup(stage)
        if stage == "fit" and not self.exits_initialised and not self.trainer.ckpt_path:
            self.initialise_exits()

    def initialise_exits(self) -> None:
        """Sets the exits' first weights as `early_exit.init` says; copied weights came with the checkpoint.

        Collective over the world; rank 0 reads the training text for a shortlist.
        """
        config, std = self.early_exit, self.cfg.get("init_method_std", 0.02)
        new, seed = self.new_exits, self.cfg.get("seed", 1234)
        shortlist = self._shortlist() if config.head.projection == "shortlist" else None
        random_std = std if config.init == "random" else None
        exit_init.initialise_projections(self.gpt, shortlist, random_std, seed, new)
        if config.init == "random":
            exit_init.initialise_randomly(self.gpt, std, seed, new)
        elif config.init == "copy":
            exit_init.start_branches_at_zero(self.gpt, new)
        else:
            self.fit_translators()
        self.exits_initialised = True

    @property
    def new_exits(self) -> frozenset[int]:
        """Exit layers that get first weights."""
        return frozenset(self.early_exit.layers) - self.kept_exits

    def _shortlist(self) -> torch.Tensor:
        """[k] the kept tokens: those of exits that are there already, or the training text's most frequent.

        Collective over the world; rank 0 reads the text.
        """
        if self.kept_exits:
            kept = [head.projection for n, head in self.gpt.exits.items() if int(n) in self.kept_exits]
            mine = kept[0].token_ids.cpu() if kept else None
            return next(found for found in collective.gather(mine) if found is not None)
        return collective.on_first_rank(self._most_frequent_tokens)

    def _most_frequent_tokens(self) -> torch.Tensor:
        """[shortlist_size] token ids of the training text. Reads files only; call it on one rank."""
        data = self.cfg.data
        counts = token_counts(
            data.data_prefix, self.true_vocab_size, data.get("splits_string"), max_tokens=ENOUGH_TOKENS
        )
        return torch.topk(counts, self.early_exit.head.shortlist_size).indices

    def exits_to_take(self, here: Collection[int], saved: DictConfig) -> Collection[int]:
        """Exits of the checkpoint at the same layers with the same modules; all others begin anew."""
        same = bool(here) and read_early_exit(saved).head.has_weights_of(self.early_exit.head)
        self.kept_exits = frozenset(here if same else ()) & frozenset(self.early_exit.layers)
        self.exits_initialised = self.kept_exits == frozenset(self.early_exit.layers)
        if here:
            parts = {
                "trained further": self.kept_exits,
                "begun anew": self.new_exits,
                "left behind": frozenset(here) - self.kept_exits,
            }
            told = ", ".join(f"{what}: {sorted(which)}" for what, which in parts.items() if which)
            logging.info(f"Exits of the checkpoint and of this run, by layer: {told}.")
        return self.kept_exits

    def copies_to_restore(self) -> ShardedStateDict:
        """What new exits copy from the backbone's checkpoint."""
        if self.exits_initialised or self.early_exit.init == "random":
            return {}
        copies = exit_init.copy_sources(self.gpt, self.cfg.num_layers, self.mlp_source)
        return {name: entry for name, entry in copies.items() if exit_layer(name) in self.new_exits}

    def mlp_source(self, layer: int) -> int:
        """The layer whose MLP the exit at `layer` copies."""
        return layer
