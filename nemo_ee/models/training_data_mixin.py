# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Data of the models that are trained: checked datasets, and loaders that go on where a run was stopped."""

import torch

from nemo_ee.checkpoint.collective import on_rank_zero
from nemo_ee.data.checks import check_data_config
from nemo_ee.data.padding import separate_padding


class TrainingDataMixin:
    """To be put before the NeMo model class."""

    def build_train_valid_test_datasets(self):
        """NeMo's, after a check that says what Megatron would answer with a hang; rank 0 reads for it."""
        data = self.cfg.data
        on_rank_zero(lambda: check_data_config(data, data.seq_length, self.true_vocab_size))
        datasets = super().build_train_valid_test_datasets()
        for dataset in datasets:
            separate_padding(dataset)
        return datasets

    @property
    def device_of_batches(self) -> torch.device:
        """Where micro-batches are computed."""
        return next(self.gpt.parameters()).device

    @staticmethod
    def forget_batch_progress(checkpoint: dict) -> None:
        """Corrects Lightning's count of batches in a checkpoint that a run resumes from.

        The data loader of a resumed run holds only what is left; Lightning would count what has been read
        before towards its length, end the epoch early and then read the first of what is left again.
        """
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        progress["current"] = dict.fromkeys(progress["current"], 0)
