# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What pre-training and tuning of exits have in common: first weights, data, and runs that go on."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.num_microbatches_calculator import get_num_microbatches
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf

from nemo_ee.checkpoint import run_keys
from nemo_ee.data.checks import LENGTH_KEY, check_data_config
from nemo_ee.data.token_counts import ENOUGH_TOKENS, token_counts
from nemo_ee.errors import ConfigError, Fault
from nemo_ee.modeling.query_key_norms import sum_query_key_norms
from nemo_ee.models.first_weights import FirstWeights
from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel
from nemo_ee.models.weight_decay import parameter_groups
from nemo_ee.runtime.children import end_with_parent
from nemo_ee.runtime.collective import on_first_rank
from nemo_ee.runtime.upstream.padding import separate_padding


class MegatronGPTEETrainingModel(MegatronGPTEarlyExitModel):
    """A model whose exits are trained, with their backbone or on top of a frozen one.

    Args:
        cfg: as `MegatronGPTEarlyExitModel`; `early_exit` is required.
        trainer: a trainer from `EarlyExitTrainerBuilder`.

    Attributes:
        length_key: what the user sets to the length of sequences.
        first_weights: which exits have weights, and what the others begin with.
    """

    length_key = LENGTH_KEY
    leaves_exits = True

    def __init__(self, cfg: DictConfig, trainer: Trainer):
        super().__init__(cfg, trainer)
        self.first_weights = FirstWeights(self.gpt, self.cfg)

    # --- first weights ------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """NeMo's set-up; then, for a fit that does not resume, the exits' first weights."""
        super().setup(stage)
        if stage == "fit" and not self.first_weights.complete and not self.trainer.ckpt_path:
            self.initialise_exits()

    def initialise_exits(self) -> None:
        """Gives exits without weights their first ones. Collective over the world; rank 0 reads the training text."""
        self.first_weights.set(self.most_frequent_tokens, self.fit_translators)

    def fit_translators(self) -> None:
        """The closed form, for models that have one."""
        raise AssertionError("refused by the checks")

    def most_frequent_tokens(self, count: int) -> torch.Tensor:
        """[count] token ids of the training text. Reads files only; call it on one rank."""
        data = self.cfg.data
        counts = token_counts(
            data.data_prefix, self.true_vocab_size, data.get("splits_string"), max_tokens=ENOUGH_TOKENS
        )
        return torch.topk(counts, count).indices

    def exits_to_take(self, here: Collection[int], saved: DictConfig) -> Collection[int]:
        """See `FirstWeights.take`."""
        return self.first_weights.take(here, saved)

    def copies_to_restore(self) -> ShardedStateDict:
        """What new exits copy from the backbone's checkpoint."""
        return self.first_weights.copies(self.mlp_source)

    def mlp_source(self, exit_layer: int) -> int:
        """The layer whose MLP the exit at a layer copies."""
        return exit_layer

    # --- data ---------------------------------------------------------------------------------------------

    def build_train_valid_test_datasets(self):
        """NeMo's, after a check that says what Megatron would answer with a hang; rank 0 reads for it."""
        data = self.cfg.data
        on_first_rank(lambda: check_data_config(data, data.seq_length, self.true_vocab_size, self.length_key))
        with self._splits_of_one_batch():
            datasets = super().build_train_valid_test_datasets()
        for dataset in datasets:
            separate_padding(dataset)
        self.without_validation()
        return datasets

    def without_validation(self) -> None:
        """Turns validations off where there is nothing to validate on, and says so."""
        if self._validation_ds is None and self.trainer.limit_val_batches:
            logging.warning("model.data has no text for validation: there will be none.")
            self.trainer.limit_val_batches = 0

    def build_pretraining_data_loader(self, *args: Any, **kwargs: Any) -> Any:
        """NeMo's; workers go on reading until the run has ended, whoever else is told to."""
        loader = super().build_pretraining_data_loader(*args, **kwargs)
        if loader is not None:
            loader.worker_init_fn = end_with_parent
        return loader

    @contextmanager
    def _splits_of_one_batch(self) -> Iterator[None]:
        """Within, limits of no batches are limits of one: megatron-core cannot blend nothing."""
        trainer = self.trainer
        limits = trainer.limit_val_batches, trainer.limit_test_batches
        trainer.limit_val_batches, trainer.limit_test_batches = limits[0] or 1, 1  # no script of ours tests
        try:
            yield
        finally:
            trainer.limit_val_batches, trainer.limit_test_batches = limits

    def setup_validation_data(self, cfg: Any) -> None:
        """NeMo's, where there is something to validate on."""
        if self._validation_ds is None:
            self._validation_dl = None
        else:
            super().setup_validation_data(cfg)

    def _reconfigure_limit_batches(self, limit_batches: int | float, dataloader: Any, mode: str) -> None:
        """NeMo's, which turns global batches into the micro-batches that Lightning counts. Its validations of a
        share of the data come out empty or end within a batch.

        Raises:
            ConfigError: the share is less than one global batch.
        """
        if mode == "train":
            super()._reconfigure_limit_batches(limit_batches, dataloader, mode)
            return
        each = get_num_microbatches()
        there = 0 if dataloader is None else len(dataloader) // each
        count = int(limit_batches * there) if isinstance(limit_batches, float) else limit_batches
        if limit_batches and not count or count and not there:
            rule = f"is less than one of the {there} global batches that there are for validation"
            remedy = "use a larger share, a smaller model.global_batch_size, more text, or 0 for none"
            raise ConfigError(Fault("trainer.limit_val_batches", limit_batches, rule, remedy))
        if count > there:
            logging.warning(
                f"trainer.limit_val_batches={count}: validations have {there} global batches, all."
            )
        self.trainer.limit_val_batches = min(count, there) * each

    # --- optimization -------------------------------------------------------------------------------------

    @property
    def trained_parameters(self) -> list[torch.nn.Parameter]:
        """Of this stage, in the order of their names in the module."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def setup_optimizer_param_groups(self) -> None:
        """Matrices decay; norms and biases with `do_layer_norm_weight_decay`."""
        self._optimizer_param_groups = parameter_groups(self.trained_parameters, self.cfg)

    def training_step_fwd_bwd_step_call(self, dataloader_iter: Iterator, forward_only: bool) -> torch.Tensor:
        """NeMo's; then sums gradients of norms of queries and keys, as Megatron's own optimizer does."""
        loss = super().training_step_fwd_bwd_step_call(dataloader_iter, forward_only)
        if not self.use_mcore_dist_optim:
            sum_query_key_norms(self.gpt, self.cfg.get("sequence_parallel", False))
        return loss

    # --- runs ---------------------------------------------------------------------------------------------

    @property
    def device_of_batches(self) -> torch.device:
        """Where micro-batches are computed."""
        return next(self.gpt.parameters()).device

    def check_resumed(self, checkpoint: dict) -> None:
        """Holds the configuration against the one that a checkpoint was written with.

        Raises:
            ConfigError: they describe other models. Weights of equal shapes would load, and mean something else.
        """
        saved = (checkpoint.get("hyper_parameters") or {}).get("cfg")
        if saved is None:
            return
        saved = OmegaConf.create(saved)
        faults = [
            Fault(
                f"model.{key}",
                mine,
                f"the checkpoint to go on from was written with {theirs}",
                _remedy(key, theirs),
            )
            for key, (theirs, mine) in run_keys.other_than(saved, self.cfg).items()
        ]
        if faults:
            raise ConfigError(*faults)
        if not self.cfg.get("restore_from_ckpt"):
            mine, theirs = (OmegaConf.to_container(cfg.optim, resolve=True) for cfg in (self.cfg, saved))
            mine.pop("fused", None)  # is this run's, see `fused_adam.keep_kernels`
            changed = [f"{key}={mine[key]}" for key in mine if mine[key] != theirs.get(key)]
            if changed:
                logging.warning(
                    f"model.optim: {', '.join(changed)}: a run that goes on keeps its optimizer and schedule as they "
                    "were; to begin with others use model.restore_from_ckpt and another name"
                )

    @staticmethod
    def forget_batch_progress(checkpoint: dict) -> None:
        """Corrects Lightning's counts of batches in a checkpoint that a run resumes from.

        The data loader of a resumed run holds only what is left; Lightning would count what has been read
        before towards its length, end the epoch early and then read the first of what is left again.
        """
        loops = checkpoint["loops"]["fit_loop"]
        progress = loops["epoch_loop.batch_progress"]
        progress["current"] = dict.fromkeys(progress["current"], 0)
        # Lightning writes checkpoints before it counts the step for its loggers.
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"]


def _remedy(key: str, theirs: Any) -> str:
    value = "null" if theirs is None else theirs
    return f"set ++model.{key}={value}, or start another run with name=…"
