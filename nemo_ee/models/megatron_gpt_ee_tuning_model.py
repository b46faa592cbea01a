# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""EE-Tuning: exits of a pre-trained GPT are tuned while its backbone is frozen (arXiv:2402.00518)."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.num_microbatches_calculator import get_num_microbatches
from nemo.utils import logging
from omegaconf import DictConfig, open_dict
from torch import Tensor

from nemo_ee.checkpoint.keys import is_exit
from nemo_ee.errors import CheckpointError
from nemo_ee.modeling.first_weights import exit_init
from nemo_ee.modeling.first_weights.fit_quality import HeldOutFit
from nemo_ee.modeling.gpt import EarlyExitGPTModel, StageStates
from nemo_ee.modeling.micro_batch import MicroBatch
from nemo_ee.models.checks.fine_tuning_checks import is_fine_tuning
from nemo_ee.models.checks.model_checks import check_model, check_tuning, read_early_exit
from nemo_ee.models.exit_metrics import ExitMetrics, validation_values
from nemo_ee.models.fine_tuning_files import FineTuningFiles, IndexedText
from nemo_ee.models.megatron_gpt_ee_training_model import MegatronGPTEETrainingModel
from nemo_ee.models.runs.finite_loss import require_finite
from nemo_ee.training.tuning_step import exit_step, run_backbone

BASE_KEY = "nemo_ee_base"
"""In a checkpoint written while tuning: name and content hash of its base."""


class MegatronGPTEETuningModel(MegatronGPTEETrainingModel):
    """Tunes exits on a frozen backbone.

    The backbone is kept in the compute dtype (`precision`), the exits and their optimizer states in float32.
    Checkpoints written while tuning hold the exits only.

    Args:
        cfg: as `MegatronGPTEarlyExitModel`; `early_exit` is required.
        trainer: a trainer from `EarlyExitTrainerBuilder`.

    Attributes:
        files: of chats or prompts, where `model.data.train_ds` names some; None where indexed text is the data.
        metrics: statistics of the exits in the current global batch.
    """

    exits_dtype = torch.float32
    files: FineTuningFiles | None = None

    def __init__(self, cfg: DictConfig, trainer: Trainer):
        check_tuning(cfg)
        super().__init__(cfg, trainer)
        self.compute_dtype = self.torch_dtype if self.torch_dtype != torch.float32 else None
        self.metrics = ExitMetrics(self.early_exit.layers)
        tuned = {parameter for parameter in self.gpt.exits.parameters() if parameter.requires_grad}
        for parameter in self.gpt.parameters():
            parameter.requires_grad_(parameter in tuned)

    # --- construction -------------------------------------------------------------------------------------

    @classmethod
    def restore_base(cls, cfg: DictConfig, trainer: Trainer) -> "MegatronGPTEETuningModel":
        """Restores the base that a configuration names, with exits. Collective over the world.

        Args:
            cfg: of `conf/megatron_gpt_ee_tuning.yaml`.
            trainer: a trainer from `EarlyExitTrainerBuilder`.

        Raises:
            ConfigError, CheckpointError, DataError: before the model is built.
        """
        config = cls.merge_cfg_with(cfg.model.restore_from_path, cfg)
        check_tuning(config)
        check_model(config, trainer.world_size, cls.built_layers(config))
        model = cls.restore_from(cfg.model.restore_from_path, override_config_path=config, trainer=trainer)
        if cfg.model.get("adapter_path"):
            model.load_adapters(cfg.model.adapter_path)
            model.first_weights.complete = True
        model.base_checkpoint.hash_now()  # while the file is what was restored
        return model

    @classmethod
    def built_layers(cls, cfg: DictConfig) -> int:
        """All layers, or those up to the last exit where nothing needs the final exit."""
        early_exit = read_early_exit(cfg)
        return cfg.num_layers if early_exit.needs_final_exit else early_exit.layers[-1]

    def build_model_parallel_config(self):
        """The frozen backbone lives in the compute dtype; the exits' autocast is entered per step."""
        config = super().build_model_parallel_config()
        config.params_dtype = config.pipeline_dtype = self.torch_dtype
        config.enable_autocast = False
        return config

    def build_transformer_config(self):
        """The configuration of the layers that are built: a frozen backbone drops nothing out."""
        depth = self.cfg.num_layers
        with open_dict(self.cfg):
            self.cfg.num_layers = self.built_layers(self.cfg)
            try:
                config = super().build_transformer_config()
            finally:
                self.cfg.num_layers = depth
        config.hidden_dropout = config.attention_dropout = 0.0
        return config

    def _wrap_model_for_O2(self) -> None:
        raise AssertionError("refused by check_tuning")

    # --- optimization -------------------------------------------------------------------------------------

    def fwd_bwd_step(self, dataloader_iter: Iterator, forward_only: bool, first_val_step: bool | None = None):
        """One global batch: statistics, and unless `forward_only` the exits' gradients.

        Returns:
            The mean objective per token, the same on every rank of the data- and model-parallel groups.

        Raises:
            TrainingError: on every rank, for a loss that is no number.
        """
        self.metrics.reset(self.device_of_batches)
        if not forward_only:
            for parameter in self.trained_parameters:
                parameter.grad = torch.zeros_like(parameter)
        count = get_num_microbatches()

        def consume(batch: MicroBatch, states: StageStates, final: Tensor | None) -> None:
            scale = (
                None if forward_only else self.gradient_scale() / (batch.loss_mask.sum().clamp_min(1) * count)
            )
            self.metrics.add(exit_step(self.gpt, batch, states, final, scale, self.compute_dtype))

        run_backbone(self.gpt, self.micro_batches(dataloader_iter), count, self.wants_teacher, consume)
        means = self.metrics.reduce()
        losses = {n: mean.objective if n else mean.loss for n, mean in means.items()}
        require_finite(losses, self.trainer.global_step + (not forward_only), forward_only)
        if not forward_only:
            for n in means.keys() - {0}:
                self.log(f"train_loss/exit_{n}", means[n].loss, rank_zero_only=True, batch_size=1)
        return self.objective(means)

    @property
    def wants_teacher(self) -> bool:
        """Whether steps see the final exit: for distillation, and for agreement where it is built anyway."""
        return not self.gpt.truncated and (self.early_exit.tuning.distils or not self.trainer.training)

    def objective(self, means: dict) -> Tensor:
        """Sum over exits of weight x mean objective."""
        total = sum(self.early_exit.loss_weight(n) * mean.objective for n, mean in means.items() if n)
        return torch.tensor(total, dtype=torch.float32, device=self.device_of_batches)

    def gradient_scale(self) -> Tensor | float:
        """The loss scale of half precision, else 1."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else scaler.scale(torch.ones((), device=self.device_of_batches))

    def micro_batches(self, dataloader_iter: Iterator) -> Iterator[MicroBatch]:
        """Micro-batches of NeMo's data loader, moved to this rank's device."""
        while True:
            data = next(dataloader_iter)
            yield self.to_micro_batch(data[0] if isinstance(data, tuple) else data)

    def to_micro_batch(self, data: dict[str, Tensor]) -> MicroBatch:
        """A collated sample batch as a `MicroBatch`."""
        moved = {key: value.to(self.device_of_batches, non_blocking=True) for key, value in data.items()}
        mask = None if self.get_attention_mask_from_fusion else moved.get("attention_mask")
        keys = ("tokens", "labels", "loss_mask", "position_ids")
        return MicroBatch(*(moved[key] for key in keys), attention_mask=mask)

    # --- validation ---------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Also measures, with `validate_at_start`, what the first weights are worth."""
        super().on_train_start()
        trainer = self.trainer
        if (
            self.cfg.get("validate_at_start", False)
            and trainer.global_step == 0
            and trainer.limit_val_batches
        ):
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def validation_step(self, dataloader_iter: Iterator, dataloader_idx: int = 0) -> Tensor:
        """Statistics of one global batch of held-out text."""
        self.gpt.eval()
        with torch.no_grad():
            loss = self.fwd_bwd_step(dataloader_iter, forward_only=True)
        self.gpt.train()
        self.metrics.keep()
        return loss

    def on_validation_epoch_end(self) -> Tensor:
        """Logs loss [nats per token], agreement with the final exit and mean confidence of every exit."""
        means = self.metrics.end_validation()
        for name, value in validation_values(means).items():
            self.log(name, value, rank_zero_only=True, batch_size=1)
        loss = self.objective(means)
        self.log("val_loss", loss, prog_bar=True, rank_zero_only=True, batch_size=1)
        consumed = float(self.compute_consumed_samples(self.trainer.global_step - self.init_global_step))
        self.log("consumed_tokens", consumed * self.text.tokens_per_sample, rank_zero_only=True, batch_size=1)
        return loss

    # --- data and first weights ---------------------------------------------------------------------------

    def model_provider_func(self, pre_process: bool, post_process: bool) -> EarlyExitGPTModel:
        """As every model's with exits, after files have been looked at with the tokenizer."""
        if is_fine_tuning(self.cfg.get("data")):
            self.start_distributed()
            steps = self.trainer.max_steps
            self.files = FineTuningFiles(self.cfg, self.text_tokenizer, self.true_vocab_size, steps)
        return super().model_provider_func(pre_process, post_process)

    def build_train_valid_test_datasets(self) -> tuple:
        """As every model's whose exits are trained, unless there are files."""
        if self.files is None:
            return super().build_train_valid_test_datasets()
        self._train_ds, self._validation_ds, self._test_ds = self.files.training, self.files.validation, None
        self.without_validation()
        return self._train_ds, self._validation_ds, self._test_ds

    def build_pretraining_data_loader(
        self, dataset: Any, consumed_samples: int, dataset_type: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As every model's whose exits are trained; of files, as their section of `model.data` says."""
        if self.files is None or dataset is None:
            return super().build_pretraining_data_loader(
                dataset, consumed_samples, dataset_type, *args, **kwargs
            )
        return self.files.loader(dataset, consumed_samples, dataset_type)

    @property
    def text(self) -> IndexedText | FineTuningFiles:
        """What first weights and logs read of the training data."""
        return IndexedText(self._train_ds, self.cfg.data.seq_length) if self.files is None else self.files

    def most_frequent_tokens(self, count: int) -> Tensor:
        """[count] token ids of the training text; of files those that are learnt."""
        if self.files is None:
            return super().most_frequent_tokens(count)
        return self.files.survey.most_frequent(count)

    def fit_translators(self) -> None:
        """Ridge regression on the last `ridge.tokens` tokens of the training samples that count.

        Logs R² of every exit on a tenth as many tokens before them, where there are so many.
        """
        for n, head in self.gpt.exits.items():
            if int(n) in self.first_weights.new:
                head.reset_for_fit()
        dp, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        text, new, size = self.text, self.first_weights.new, self.cfg.micro_batch_size
        widest = self.transformer_config.hidden_size
        if any(self.early_exit.heads[n].mlp != "none" for n in new):
            widest += self.transformer_config.ffn_hidden_size
        samples, tokens = text.samples_from_end(self.early_exit.ridge.tokens_for(widest))
        count = -(-samples // (size * dp))
        more = -(-count // 10)

        def batches(first_index: int, end: int) -> Iterator[MicroBatch]:
            for index in range(first_index, end):
                first = (index * dp + rank) * size
                chosen = [text.sample_from_end(first + i) for i in range(size)]
                yield self.to_micro_batch(text.collate(chosen))

        logging.info(f"Fitting {len(new)} translators on {tokens} tokens of {samples} samples.")
        for layers in exit_init.ridge_passes(self.gpt, new):
            fit = exit_init.RidgeInitialiser(self.gpt, layers)
            run_backbone(self.gpt, batches(0, count), count, True, fit)
            fit.finish(self.early_exit.ridge.penalty)
        if (count + more) * size * dp > text.samples_to_fit:
            logging.warning("No text is left to hold out: how well the closed form fits is not known.")
            return
        held_out = HeldOutFit(self.gpt)
        run_backbone(self.gpt, batches(count, count + more), more, True, held_out)
        for n, value in sorted(held_out.finish().items()):
            logging.info(f"Exit {n}: R² {value:.4f} on {more * size * dp} samples that were held out.")

    # --- checkpoints --------------------------------------------------------------------------------------

    def sharded_state_dict(self, prefix: str = "") -> ShardedStateDict:
        """The exits only: what tuning changes is what its checkpoints hold."""
        return self.gpt.exits.sharded_state_dict(f"{prefix}model.exits.")

    def mlp_source(self, exit_layer: int) -> int:
        """The layer whose MLP an exit copies: its own (EE-Tuning), or for the closed form the next one.

        The next layer's MLP reads almost the same state and computes what the exit still lacks.
        """
        return exit_layer if self.early_exit.init == "copy" else min(exit_layer + 1, self.cfg.num_layers)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """NeMo's, and which base the exits belong to. Collective at the first call, see `BaseCheckpoint`."""
        super().on_save_checkpoint(checkpoint)
        if (base := self.base_checkpoint) is not None:
            checkpoint[BASE_KEY] = {"name": base.name, "content_hash": base.content_hash}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Loads the exits of a checkpoint written while tuning; the backbone has come from its base.

        Raises:
            CheckpointError: it was written on another base, or for other exits.
        """
        self.check_base(checkpoint.get(BASE_KEY))
        self.check_resumed(checkpoint)
        loaded = checkpoint.pop("state_dict", {})
        result = self.gpt.load_state_dict(
            {key.removeprefix("model."): value for key, value in loaded.items()}, strict=False
        )
        missing = [key for key in result.missing_keys if is_exit(key)]
        if loaded and (missing or result.unexpected_keys):
            raise CheckpointError(
                f"checkpoint of other exits: missing {missing[:3]}, unexpected {result.unexpected_keys[:3]}; "
                "resume with the early_exit section it was started with"
            )
        self.first_weights.complete = bool(loaded)
        checkpoint["state_dict"] = {}
        self.forget_batch_progress(checkpoint)

    def check_base(self, saved: dict | None) -> None:
        """Raises CheckpointError if a run to resume has another base; `saved` is what it noted of its own."""
        base = self.base_checkpoint
        if saved and base is not None and saved["content_hash"] != base.content_hash:
            raise CheckpointError(
                f"model.restore_from_path={base.path}: has content hash {base.content_hash}, but the run to "
                f"resume was started on {saved['name']} with {saved['content_hash']}; give that base, or "
                "start another run with name=… or exp_manager.resume_if_exists=false"
            )

    def save_to(self, save_path: str) -> None:
        """Saves the exits alone, naming their base; see `nemo_ee.checkpoint.exits.adapter`."""
        self.save_adapters(save_path)
