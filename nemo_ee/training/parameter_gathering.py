# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Parameters that megatron-core gathers over data parallelism while the model computes already.

With `overlap_param_gather` an optimizer step leaves each rank with its own share of new values. A bucket of
parameters is gathered when the next forward passes come near it; the pre-hook of a module's call waits for the
bucket of its own parameters (`DistributedDataParallel._make_forward_pre_hook`). Two things do not fit: a weight that
is read in a forward pass before its module is called, as the output weight by exits that are only evaluated, and a
module that no micro-batch of a step calls, as an exit whose loss has no weight in that step.
"""

from collections.abc import Iterable

from megatron.core.distributed import DistributedDataParallel


def gather_all(model: Iterable[DistributedDataParallel]) -> None:
    """Waits until all parameters are the whole ones, gathering those that nothing has asked for yet.

    Call it between an optimizer step and passes without gradients, or whatever else reads parameters outside a
    training step. Collectives: one all-gather over data parallelism per bucket that was not gathered.
    """
    for part in model:
        for group in part.bucket_groups + part.expert_parallel_bucket_groups:
            if group.param_gather_handle is not None or not group.param_gather_dispatched:
                group.start_param_sync(force_sync=True)


def finish_gathering(model: Iterable[DistributedDataParallel]) -> None:
    """Waits for what a training step began to gather and no module has waited for.

    The optimizer writes to these parameters next, and megatron-core asserts that each gathering has ended
    when the next one begins.
    """
    for part in model:
        for group in part.bucket_groups + part.expert_parallel_bucket_groups:
            if group.param_gather_handle is not None:
                group.start_param_sync(force_sync=True)
