# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Global batches that grow over a run's first samples (`model.rampup_batch_size`), for a model that NeMo trains.

The size is Megatron's function of the samples consumed, and those are a function of the step, so a resumed run
goes on with the batches that it would have had. NeMo 2.4 has another way: it stops a run at every increase, for a
script around it to start it again; and since Apex left it, its first step ends in a NameError.
"""

from typing import Any

from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import (
    RampupBatchsizeNumMicroBatchesCalculator,
    get_current_global_batch_size,
    update_num_microbatches,
)

NO_RANK = -1
"""In place of rank 0, which alone has Megatron's calculator write to the log."""


class RampupBatchSizeMixin:
    """To be put before the NeMo model class.

    Validation has full batches throughout, so that its results can be compared over a run.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rampup_batch_size = None  # NeMo's own part, see above; the setting is in `cfg`

    @property
    def ramps_up(self) -> bool:
        """Whether batches grow."""
        return bool(self.cfg.get("rampup_batch_size"))

    def setup(self, stage: str | None = None) -> None:
        """NeMo's, which sizes data and limits of loops by the number of micro-batches: the full one."""
        self.choose_batch_size(training=False)
        super().setup(stage)

    def choose_batch_size(self, training: bool) -> None:
        """Sets Megatron's number of micro-batches: that of the current step, or for validation the full one."""
        if not self.ramps_up:
            return
        if not training:
            update_num_microbatches(self.cfg.rampup_batch_size[-1] + 1)
            return
        update_num_microbatches(
            self.compute_consumed_samples(self.trainer.global_step - self.init_global_step)
        )
        self.log("global_batch_size", get_current_global_batch_size(), rank_zero_only=True, batch_size=1)

    def compute_consumed_samples(self, steps_since_resume: int = 0) -> int:
        """As NeMo's; batches that grow are added up."""
        if not self.ramps_up:
            return super().compute_consumed_samples(steps_since_resume)
        start, increment, samples = self.cfg.rampup_batch_size
        calculator = RampupBatchsizeNumMicroBatchesCalculator(
            self.cfg.global_batch_size,
            self.cfg.micro_batch_size,
            parallel_state.get_data_parallel_world_size(),
            False,
            NO_RANK,
            start,
            increment,
            samples,
        )
        consumed = self.init_consumed_samples
        for step in range(steps_since_resume):
            if consumed > samples:
                return consumed + (steps_since_resume - step) * self.cfg.global_batch_size
            calculator.update(consumed, consistency_check=True)
            consumed += calculator.get_current_global_batch_size()
        return consumed
