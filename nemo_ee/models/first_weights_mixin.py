# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""First weights of exits that are about to be trained, with their backbone or on top of a frozen one."""

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from nemo_ee.checkpoint.collective import on_rank_zero
from nemo_ee.data.token_counts import ENOUGH_TOKENS, token_counts
from nemo_ee.megatron import exit_init


class FirstWeightsMixin:
    """To be put before the NeMo model class.

    Attributes:
        exits_initialised: the exits have come with a checkpoint, or have their first weights.
    """

    exits_initialised: bool = False

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
        shortlist = None
        if config.head.projection == "shortlist":
            shortlist = on_rank_zero(self.most_frequent_tokens)
        seed = self.cfg.get("seed", 1234)
        exit_init.initialise_projections(self.gpt, shortlist, std if config.init == "random" else None, seed)
        if config.init == "random":
            exit_init.initialise_randomly(self.gpt, std, seed)
        elif config.init == "copy":
            exit_init.start_branches_at_zero(self.gpt)
        else:
            self.fit_translators()
        self.exits_initialised = True

    def most_frequent_tokens(self) -> torch.Tensor:
        """[shortlist_size] token ids of the training text. Reads files only; call it on one rank."""
        data = self.cfg.data
        counts = token_counts(
            data.data_prefix, self.true_vocab_size, data.get("splits_string"), max_tokens=ENOUGH_TOKENS
        )
        return torch.topk(counts, self.early_exit.head.shortlist_size).indices

    def state_to_restore(self, with_exits: bool) -> ShardedStateDict:
        """What restoring reads from a full checkpoint; notes whether exits come with it."""
        self.exits_initialised = with_exits
        return super().state_to_restore(with_exits)
