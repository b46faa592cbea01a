# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""One rank reads the training text before the first step, a bounded share of it, for all."""

from types import SimpleNamespace

import torch


def start() -> tuple[list, list]:
    """What this rank read, and the shortlist that its exits got."""
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from omegaconf import OmegaConf

    from nemo_ee.models import first_weights
    from nemo_ee.models import megatron_gpt_ee_training_model as models

    read, given = [], []

    def token_counts(prefix, vocab_size, splits, max_tokens):
        read.append(("counts", max_tokens))
        return torch.tensor([5, 1, 9, 0, 7]) * (1 + torch.distributed.get_rank())

    models.token_counts = token_counts
    models.check_data_config = lambda *_: read.append(("check", None))
    first_weights.exit_init = SimpleNamespace(
        initialise_projections=lambda gpt, shortlist, *_: given.append(sorted(shortlist.tolist())),
        start_branches_at_zero=lambda *_: None,
    )

    MegatronGPTModel.build_train_valid_test_datasets = lambda self: [None, None, None]
    head = SimpleNamespace(projection="shortlist", shortlist_size=3)

    class Model(models.MegatronGPTEETrainingModel):
        cfg = OmegaConf.create(dict(data=dict(data_prefix=["text"], splits_string="1", seq_length=4)))
        early_exit = SimpleNamespace(heads={2: head}, init="copy", layers=(2,))
        gpt = SimpleNamespace(early_exit=early_exit)
        true_vocab_size, _validation_ds = 5, None
        trainer = SimpleNamespace(limit_val_batches=0, limit_test_batches=0)

        def __init__(self):
            self.first_weights = first_weights.FirstWeights(self.gpt, self.cfg)

    model = Model()
    model.build_train_valid_test_datasets()
    model.initialise_exits()
    return read, given


def test_one_rank_reads_for_all(workers):
    (read, first), (nothing, second) = workers(2).run(start)
    assert read == [("check", None), ("counts", 100_000_000)] and nothing == []
    assert first == second == [[0, 2, 4]]
