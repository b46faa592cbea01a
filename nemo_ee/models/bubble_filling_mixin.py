# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Global batches with extra micro-batches in the pipeline's bubbles, for a model that NeMo trains.

Fills come on top of the global batch: a step has `plan.samples` micro-batches per data-parallel rank instead
of their usual number, all taken from the data loader in order and all counted as consumed.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.num_microbatches_calculator import get_num_microbatches
from omegaconf import open_dict
from torch import Tensor

from nemo_ee.training.bubble_schedule import Event, Links, forward_backward_by_plan, take_batches
from nemo_ee.training.bubbles import Pass, Plan, plan_step


class BubbleFillingMixin:
    """To be put before the NeMo model class.

    Attributes:
        links: of this pipeline, where bubbles are filled; None leaves everything to Megatron.
        running: the forward pass that is running, while a step with fills is.
        events: set to a list, it gets what ran when.
    """

    links: Links | None = None
    running: Pass | None = None
    events: list[Event] | None = None

    def fwd_bwd_step_with_fills(self, dataloader_iter: Iterator) -> Tensor:
        """One global batch, and extra micro-batches in the pipeline's bubbles."""
        config = self.gpt.config
        model = self.model[0] if isinstance(self.model, list) else self.model
        overlaps = self.use_mcore_dist_optim and self.cfg.optim.get("overlap_grad_sync", False)
        config.no_sync_func = model.no_sync if overlaps else None
        config.grad_sync_func = config.param_sync_func = None
        config.finalize_model_grads_func = finalize_model_grads if self.use_mcore_dist_optim else None

        def before_forward(step: Pass) -> None:
            self.running = step

        losses = forward_backward_by_plan(
            self.plan,
            self.links,
            self.get_forward_output_and_loss_func(),
            model,
            take_batches(dataloader_iter, self.plan.samples),
            self.cfg.encoder_seq_length,
            self.cfg.micro_batch_size,
            before_forward,
            self.events,
        )
        self.running = None
        if not losses:
            return torch.zeros((), device=self.device_of_batches)
        return torch.cat([loss["avg"] for loss in losses]).mean()

    @cached_property
    def plan(self) -> Plan:
        """The order of passes of all stages. Collective over the pipeline the first time."""
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        with_exits: list = [None] * stages
        group = parallel_state.get_pipeline_model_parallel_group()
        torch.distributed.all_gather_object(with_exits, bool(self.gpt.exit_layers), group=group)
        filling = self.training_config.bubble_filling
        return plan_step(
            stages,
            get_num_microbatches(),
            filling.backward_ratio,
            tuple(with_exits),
            filling.warmup,
            filling.cooldown,
        )

    @property
    def micro_batches_per_step(self) -> int:
        """Of one data-parallel rank, fills included."""
        return get_num_microbatches() if self.links is None else self.plan.samples

    def compute_consumed_samples(self, steps_since_resume: int = 0) -> int:
        """As NeMo's; fills are samples like others, consumed on top of the global batch."""
        if self.links is None:
            return super().compute_consumed_samples(steps_since_resume)
        per_step = self.micro_batches_per_step * self.cfg.micro_batch_size
        return self.init_consumed_samples + steps_since_resume * per_step * (
            parallel_state.get_data_parallel_world_size()
        )

    def build_train_valid_test_datasets(self):
        """As NeMo's, with enough samples for fills."""
        size = self.cfg.global_batch_size
        with open_dict(self.cfg):
            self.cfg.global_batch_size = size * self.micro_batches_per_step // get_num_microbatches()
            try:
                return super().build_train_valid_test_datasets()
            finally:
                self.cfg.global_batch_size = size
