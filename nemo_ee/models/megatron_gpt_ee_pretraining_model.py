# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Pre-training: a GPT and its early exits are trained together (arXiv:2312.04916)."""

from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from functools import partial

import torch
from lightning.pytorch import Trainer
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.distributed import finalize_model_grads
from megatron.core.num_microbatches_calculator import get_current_global_batch_size, get_num_microbatches
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from nemo_ee.checkpoint import archive, run_keys
from nemo_ee.errors import ConfigError, Fault
from nemo_ee.modeling.layer_dropout import LayerDropout
from nemo_ee.modeling.tied_weight import tie_output_weights
from nemo_ee.models.bubble_filling import BubbleFilling
from nemo_ee.models.checks.model_checks import check_model, check_pretraining, read_early_exit
from nemo_ee.models.exit_metrics import validation_values
from nemo_ee.models.megatron_gpt_ee_training_model import MegatronGPTEETrainingModel
from nemo_ee.models.rampup_batch_size import RampupBatchSize
from nemo_ee.models.runs.finite_loss import require_finite
from nemo_ee.models.runs.resumed_checkpoint import checkpoint_to_start_from
from nemo_ee.models.training_metrics import TrainingMetrics
from nemo_ee.models.weight_decay import decays_vectors
from nemo_ee.training.bubble_plan import COOLDOWN, FULL
from nemo_ee.training.deferred_loss import ExitTargets
from nemo_ee.training.loss_schedule import layer_dropout_rate, loss_weights
from nemo_ee.training.parameter_gathering import finish_gathering, gather_all


class MegatronGPTEEPretrainingModel(MegatronGPTEETrainingModel):
    """`MegatronGPTModel` whose exits are trained together with it, through Megatron's own schedules.

    The objective is L_final + sum over exits of w_i(t) L_i, each L the mean cross-entropy per token of a
    micro-batch; w_i(t) is `nemo_ee.training.loss_schedule.loss_weights`.

    Args:
        cfg: as `MegatronGPTEarlyExitModel`; `early_exit` is required.
        trainer: a trainer from `EarlyExitTrainerBuilder`.

    Attributes:
        filling: of the pipeline's bubbles; None leaves every step to Megatron's schedules.
        rampup: of the batch size; None where all batches are of one.
        metrics: statistics of the exits in the current global batch.
    """

    length_key = "model.encoder_seq_length"

    def __init__(self, cfg: DictConfig, trainer: Trainer):
        check_pretraining(cfg)
        super().__init__(cfg, trainer)
        self.training_config = self.early_exit.training
        self.rampup_batch_size = None  # NeMo's own part, see `RampupBatchSize`; the setting is in `cfg`
        self.rampup = RampupBatchSize(self.cfg) if self.cfg.get("rampup_batch_size") else None
        for parameter in self.gpt.exits.parameters():
            parameter.requires_grad_(True)
        self.tied_weight = tie_output_weights(self.gpt)
        filling = self.training_config.bubble_filling
        self.filling = BubbleFilling(filling, self.gpt) if filling.enabled else None
        self.metrics = TrainingMetrics(self.early_exit.layers, self.gpt)
        self._parameters_are_shares = False

    # --- construction -------------------------------------------------------------------------------------

    @classmethod
    def start(cls, cfg: DictConfig, trainer: Trainer) -> "MegatronGPTEEPretrainingModel":
        """The model that a configuration describes: from scratch, or continued. Collective over the world.

        Args:
            cfg: of `conf/megatron_gpt_ee_pretraining.yaml`.
            trainer: a trainer from `EarlyExitTrainerBuilder`; with `restore_from_ckpt` its `ckpt_path` is set,
                unless this run has a checkpoint of its own to go on from.

        Raises:
            ConfigError, CheckpointError: before the model is built.
        """
        ckpt = None if trainer.ckpt_path else checkpoint_to_start_from(cfg.model)
        if path := cfg.model.get("restore_from_path"):
            config = cls.continued_config(cfg, run_keys.command_line_keys())
            check_pretraining(config)
            check_model(config, trainer.world_size)
            return cls.restore_from(path, override_config_path=config, trainer=trainer)
        with open_dict(cfg.model):  # which makes NeMo count steps and samples from 0
            cfg.model.restore_from_ckpt = ckpt
            if OmegaConf.is_missing(cfg.model.tokenizer, "type"):
                cfg.model.tokenizer.type = None  # of a tokenizer that is one file
        trainer.ckpt_path = ckpt or trainer.ckpt_path
        return cls(cfg.model, trainer)

    @classmethod
    def continued_config(cls, cfg: DictConfig, given: Collection[str] = ()) -> DictConfig:
        """The checkpoint's description of the model, and what a run chooses from `cfg`.

        Args:
            cfg: of `conf/megatron_gpt_ee_pretraining.yaml`.
            given: dotted keys below `model` that count even if they describe the model: those of the command
                line. A default of the YAML says nothing about the checkpoint.

        Raises:
            ConfigError: another number of learned positions than the checkpoint has.
        """
        path, run = cfg.model.restore_from_path, cfg.model
        saved, config = archive.read_config(path), cls._put_over(path, cfg, given)
        positions = saved.encoder_seq_length
        learned = config.get("position_embedding_type", "learned_absolute") == "learned_absolute"
        if learned and config.encoder_seq_length != positions:
            rule, remedy = f"{path} has {positions} learned positions", f"use {positions}"
            raise ConfigError(Fault("model.encoder_seq_length", config.encoder_seq_length, rule, remedy))
        if "data.seq_length" not in given and run.data.seq_length == run.get("encoder_seq_length"):
            config.data.seq_length = config.encoder_seq_length
        theirs = [
            f"{key}={config[key]}"
            for key, value in run.items()
            if key in config and config[key] != value and not run_keys.belongs_to_run(key, saved)
        ]
        logging.info(
            f"{path}: describes the model, whatever the configuration file says: {', '.join(theirs)}."
        )
        return config

    def module_arguments(self) -> dict:
        """Of `EarlyExitGPTModel`, beyond what every model with exits gives it."""
        return dict(trains_backbone=True, pre_exit=read_early_exit(self.cfg).training.pre_exit)

    # --- data and batches ---------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """As every model's whose exits are trained; then frees what only their first weights came from."""
        if self.rampup is not None:  # NeMo sizes data and limits of loops by the number of micro-batches
            self.rampup.choose()
        super().setup(stage)
        self.gpt.drop_frozen_copy()

    def build_train_valid_test_datasets(self):
        """As every model's whose exits are trained, with enough samples for fills."""
        with nullcontext() if self.filling is None else self.filling.in_global_batch(self.cfg):
            return super().build_train_valid_test_datasets()

    def compute_consumed_samples(self, steps_since_resume: int = 0) -> int:
        """NeMo's; batches that grow are added up, and fills are samples like others, on top of the global batch."""
        if self.rampup is not None:
            return self.rampup.consumed(self.init_consumed_samples, steps_since_resume)
        if self.filling is not None:
            return self.init_consumed_samples + steps_since_resume * self.filling.samples_per_step(self.cfg)
        return super().compute_consumed_samples(steps_since_resume)

    def choose_batch_size(self, training: bool) -> None:
        """Sets Megatron's number of micro-batches, where they grow, to that of the current step."""
        if not training:
            self.rampup.choose()
            return
        self.rampup.choose(self.compute_consumed_samples(self.trainer.global_step - self.init_global_step))
        self.log("global_batch_size", get_current_global_batch_size(), rank_zero_only=True, batch_size=1)

    # --- optimization -------------------------------------------------------------------------------------

    def setup_optimization(self, *args, **kwargs):
        """NeMo's; then weight decay in Megatron's optimizer."""
        result = super().setup_optimization(*args, **kwargs)
        if self.use_mcore_dist_optim:
            self.decay_megatrons_groups()
        return result

    def decay_megatrons_groups(self) -> None:
        """Sets what Megatron's own `wd_mult` says, which NeMo does not look at."""
        for group in self._optimizer.param_groups:
            share = 1.0 if decays_vectors(self.cfg) else group.get("wd_mult", 1.0)
            group["weight_decay"] = self.cfg.optim.get("weight_decay", 0.0) * share

    def fwd_bwd_step(self, dataloader_iter: Iterator, forward_only: bool, first_val_step: bool | None = None):
        """One global batch, as NeMo's; collects the exits' statistics on the way."""
        if forward_only:
            self.gather_parameters()
        if self.rampup is not None:
            self.choose_batch_size(training=not forward_only)
        self.metrics.start(self.device_of_batches, observe=forward_only or self.logs_this_step)
        self._next_micro_batch = 0
        if self.filling is not None and not forward_only:
            loss = self.step_with_fills(dataloader_iter)
        else:
            loss = super().fwd_bwd_step(dataloader_iter, forward_only, first_val_step)
        if self.overlaps_gathering and not forward_only:
            finish_gathering(self.model)
            self._parameters_are_shares = True
        if not forward_only:
            require_finite(self.metrics.not_finite(loss), self.trainer.global_step + 1)
        if self.metrics.observing:
            means = self.metrics.finish(get_num_microbatches())
            if forward_only:
                self.metrics.keep()
            else:
                self.log_training(means)
        return loss

    def step_with_fills(self, dataloader_iter: Iterator) -> Tensor:
        """One global batch, and extra micro-batches in the pipeline's bubbles; the mean loss of the former."""
        config = self.gpt.config
        model = self.model[0] if isinstance(self.model, list) else self.model
        overlaps = self.use_mcore_dist_optim and self.cfg.optim.get("overlap_grad_sync", False)
        config.no_sync_func = model.no_sync if overlaps else None
        config.grad_sync_func = config.param_sync_func = None
        config.finalize_model_grads_func = finalize_model_grads if self.use_mcore_dist_optim else None
        step = self.get_forward_output_and_loss_func()
        losses = self.filling.run(step, model, dataloader_iter, self.cfg)
        if not losses:
            return torch.zeros((), device=self.device_of_batches)
        return torch.cat([loss["avg"] for loss in losses]).mean()

    @property
    def overlaps_gathering(self) -> bool:
        """Whether forward passes begin while parameters are still gathered over data parallelism."""
        return self.use_mcore_dist_optim and self.cfg.optim.get("overlap_param_sync", False)

    def gather_parameters(self) -> None:
        """Makes parameters whole after an optimizer step, for whoever reads them outside a training step.

        Collective over data parallelism where gathering overlaps, see `parameter_gathering.gather_all`.
        """
        if self._parameters_are_shares:
            gather_all(self.model)
            self._parameters_are_shares = False

    def sharded_state_dict(self, prefix: str = "") -> ShardedStateDict:
        """NeMo's, of whole parameters. Collective over data parallelism where gathering overlaps."""
        self.gather_parameters()
        return super().sharded_state_dict(prefix)

    def on_train_end(self) -> None:
        """NeMo's; the model may be used now."""
        self.gather_parameters()
        super().on_train_end()

    def training_step_fwd_bwd_step_call(self, dataloader_iter: Iterator, forward_only: bool) -> Tensor:
        """As every model's whose exits are trained; sums copies of the output weight where NeMo sums no embedding's
        gradients."""
        loss = super().training_step_fwd_bwd_step_call(dataloader_iter, forward_only)
        if not self.gpt.tied_to_embedding and not self.use_mcore_dist_optim and self.tied_weight is not None:
            self.tied_weight.sum_gradients()
        return loss

    def allreduce_first_last_embeddings(self) -> None:
        """NeMo's; then all copies of the output weight."""
        super().allreduce_first_last_embeddings()
        if self.gpt.tied_to_embedding and self.tied_weight is not None:
            self.tied_weight.sum_gradients()

    def get_forward_output_and_loss_func(
        self, validation_step: bool = False, tuning: bool = False
    ) -> Callable:
        """NeMo's step function, which gives the module its exits' targets as well."""
        self._wrap_finalize()
        nemo_step = super().get_forward_output_and_loss_func(validation_step, tuning)

        def step(iterator: Iterator, model: torch.nn.Module, *more) -> tuple:
            batch = self.get_batch(iterator, tuning)
            index, self._next_micro_batch = self._next_micro_batch, self._next_micro_batch + 1
            if self.filling is not None and self.filling.running is not None:
                index = self.filling.running.sample
            run = partial(self._run_micro_batch, model, batch, index)
            return nemo_step(iter([batch]), run, *more)

        return step

    def _wrap_finalize(self) -> None:
        """Lets Megatron's end of a global batch sum the copies of the output weight, too."""
        finalize = self.gpt.config.finalize_model_grads_func
        if finalize is None or self.tied_weight is None:
            return

        def finalize_with_copies(*args, **kwargs) -> None:
            finalize(*args, **kwargs)
            self.tied_weight.sum_gradients()

        self.gpt.config.finalize_model_grads_func = finalize_with_copies

    def _run_micro_batch(self, model: torch.nn.Module, batch: dict, index: int, **arguments) -> Tensor:
        kind = FULL if self.filling is None else self.filling.kind
        if kind == COOLDOWN and not torch.is_grad_enabled():
            self.gpt.layer_dropout = self.layer_dropout(index)
            return model(**arguments)  # a stage that a fill only passes through
        device = self.device_of_batches
        needed = self.gpt.exit_layers or parallel_state.is_pipeline_last_stage()
        labels, mask = (
            batch[key].to(device, non_blocking=True) if needed else batch[key]
            for key in ("labels", "loss_mask")
        )
        targets = ExitTargets(
            labels,
            mask,
            self.loss_weights_now() if self.gpt.training else dict.fromkeys(self.early_exit.layers, 1.0),
            self.training_config.objective,
            partial(self.gradient_scale, kind),
            partial(self.metrics.add_exit, index, mask) if kind == FULL else self.metrics.note_finite,
            self.layer_dropout(index) if self.gpt.training else None,
        )
        if kind != FULL:
            return model(exit_targets=targets, **arguments)
        with self.metrics.final_exit(index, mask):
            output = model(exit_targets=targets, **arguments)
        if parallel_state.is_pipeline_last_stage():
            self.metrics.add_final_loss(output, mask)
        return output

    def gradient_scale(self, kind: str) -> Tensor | float:
        """Megatron's factor of a micro-batch's loss, 1 / number of micro-batches and the loss scale; with
        fills in the step, also their share (see `nemo_ee.training.bubble_plan`)."""
        scale = 1.0 / get_num_microbatches()
        if self.filling is not None:
            scale *= self.filling.loss_scale(kind)
        function = self.gpt.config.grad_scale_func
        return scale if function is None else function(torch.full((), scale, device=self.device_of_batches))

    def loss_weights_now(self) -> dict[int, float]:
        """Exit layer -> weight of its loss in the current optimizer step."""
        return loss_weights(
            self.training_config, self.early_exit.layers, self.cfg.num_layers, self.trainer.global_step
        )

    def layer_dropout(self, index: int) -> LayerDropout | None:
        """Which samples of the current step's micro-batch number `index` skip which layers."""
        config, step, depth = (
            self.training_config.layer_dropout,
            self.trainer.global_step,
            self.cfg.num_layers,
        )
        if config.max_rate == 0.0:
            return None
        rates = {n: layer_dropout_rate(config, n, depth, step) for n in range(1, depth + 1)}
        return LayerDropout(
            rates, (self.cfg.get("seed", 1234), step, index, parallel_state.get_data_parallel_rank())
        )

    # --- metrics ------------------------------------------------------------------------------------------

    @property
    def logs_this_step(self) -> bool:
        """Whether the trainer logs the current step: only then are statistics reduced over ranks."""
        every = self.trainer.log_every_n_steps
        return every > 0 and (self.trainer.global_step + 1) % every == 0

    def log_training(self, means: dict) -> None:
        """Logs loss [nats per token], confidence, agreement with the final exit, and weight of every exit."""
        weights = self.loss_weights_now()
        for n, mean in means.items():
            name = f"exit_{n}" if n else "final"
            values = {"loss": mean.loss, "confidence": mean.confidence}
            if n:
                values |= {"agreement": mean.agreement, "loss_weight": weights[n]}
            for what, value in values.items():
                self.log(f"train_{what}/{name}", value, rank_zero_only=True, batch_size=1)

    def on_validation_epoch_end(self) -> Tensor:
        """NeMo's `val_loss` of the final exit; and loss, confidence and agreement of every exit."""
        loss = super().on_validation_epoch_end()
        means = self.metrics.end_validation()
        require_finite({n: mean.loss for n, mean in means.items()}, self.trainer.global_step, validation=True)
        for name, value in validation_values(means).items():
            self.log(name, value, rank_zero_only=True, batch_size=1)
        return loss

    # --- checkpoints --------------------------------------------------------------------------------------

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """NeMo's; the exits come with the checkpoint."""
        self.check_resumed(checkpoint)
        MegatronGPTModel.on_load_checkpoint(self, checkpoint)
        self.first_weights.complete = True
        self.forget_batch_progress(checkpoint)
