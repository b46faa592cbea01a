# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Global batches with extra micro-batches in the pipeline's bubbles, for a model that NeMo trains.

Fills come on top of the global batch: a step has `plan.samples` micro-batches per data-parallel rank instead
of their usual number, all taken from the data loader in order and all counted as consumed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from omegaconf import DictConfig, open_dict

from nemo_ee.config import BubbleFillingConfig
from nemo_ee.modeling.gpt import EarlyExitGPTModel
from nemo_ee.training.bubble_plan import FULL, Pass, Plan, plan_step
from nemo_ee.training.bubble_schedule import DirectionGroups, Event, forward_backward_by_plan


class BubbleFilling:
    """Runs steps with fills, and says how much they consume. Collective over the world when it is made.

    Args:
        settings: which bubbles to fill.
        gpt: this stage's module.

    Attributes:
        running: the forward pass that is running, while a step is.
        events: set to a list, it gets what ran when.
    """

    def __init__(self, settings: BubbleFillingConfig, gpt: EarlyExitGPTModel):
        self.settings, self.gpt, self.links = settings, gpt, DirectionGroups()
        self.running: Pass | None = None
        self.events: list[Event] | None = None

    @cached_property
    def plan(self) -> Plan:
        """The order of passes of all stages. Collective over the pipeline the first time."""
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        with_exits: list = [None] * stages
        group = parallel_state.get_pipeline_model_parallel_group()
        torch.distributed.all_gather_object(with_exits, bool(self.gpt.exit_layers), group=group)
        return plan_step(
            stages,
            get_num_microbatches(),
            self.settings.backward_ratio,
            tuple(with_exits),
            self.settings.warmup,
            self.settings.cooldown,
        )

    @property
    def kind(self) -> str:
        """Of the micro-batch whose forward pass is running."""
        return FULL if self.running is None else self.running.kind

    def loss_scale(self, kind: str) -> float:
        """Factor of this stage's losses of a micro-batch, relative to those of a step without fills."""
        return self.plan.loss_scale(kind, parallel_state.get_pipeline_model_parallel_rank())

    def run(self, step: Callable, model: torch.nn.Module, batches: Iterator, cfg: DictConfig) -> list:
        """Forward and backward passes of one global batch and its fills; see `forward_backward_by_plan`."""

        def before_forward(running: Pass) -> None:
            self.running = running

        try:
            return forward_backward_by_plan(
                self.plan,
                self.links,
                step,
                model,
                [next(batches) for _ in range(self.plan.samples)],
                cfg.encoder_seq_length,
                cfg.micro_batch_size,
                before_forward,
                self.events,
            )
        finally:
            self.running = None

    def samples_per_step(self, cfg: DictConfig) -> int:
        """Of all data-parallel ranks, fills included."""
        return self.plan.samples * cfg.micro_batch_size * parallel_state.get_data_parallel_world_size()

    @contextmanager
    def in_global_batch(self, cfg: DictConfig) -> Iterator[None]:
        """Within, a configuration's global batch has its fills, so that datasets are built large enough."""
        size = cfg.global_batch_size
        with open_dict(cfg):
            cfg.global_batch_size = size * self.plan.samples // get_num_microbatches()
            try:
                yield
            finally:
                cfg.global_batch_size = size
