# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Global batches that grow over a run's first samples (`model.rampup_batch_size`), for a model that NeMo trains.

The size is Megatron's function of the samples consumed, and those are a function of the step, so a resumed run
goes on with the batches that it would have had. NeMo 2.4 has another way: it stops a run at every increase, for a
script around it to start it again; and since Apex left it, its first step ends in a NameError.
"""

from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import (
    RampupBatchsizeNumMicroBatchesCalculator,
    update_num_microbatches,
)
from omegaconf import DictConfig

NO_RANK = -1
"""In place of rank 0, which alone has Megatron's calculator write to the log."""


class RampupBatchSize:
    """Sizes of batches over a run. Validation has full ones throughout, so that its results can be compared.

    Args:
        cfg: of the model, with `rampup_batch_size`.
    """

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg
        self.start, self.increment, self.samples = cfg.rampup_batch_size

    def choose(self, consumed: int | None = None) -> None:
        """Sets Megatron's number of micro-batches to that after so many samples; None: that of full batches."""
        update_num_microbatches(self.samples + 1 if consumed is None else consumed)

    def consumed(self, before: int, steps: int) -> int:
        """Samples after so many more steps."""
        calculator = RampupBatchsizeNumMicroBatchesCalculator(
            self.cfg.global_batch_size,
            self.cfg.micro_batch_size,
            parallel_state.get_data_parallel_world_size(),
            False,
            NO_RANK,
            self.start,
            self.increment,
            self.samples,
        )
        for step in range(steps):
            if before > self.samples:
                return before + (steps - step) * self.cfg.global_batch_size
            calculator.update(before, consistency_check=True)
            before += calculator.get_current_global_batch_size()
        return before
