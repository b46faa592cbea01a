# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Megatron's count of micro-batches, which the process has one of."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core import num_microbatches_calculator


@contextmanager
def kept_microbatches() -> Iterator[None]:
    """Puts back Megatron's micro-batch calculator, which NeMo's loop sets to the prompts' number for good."""
    calculator = num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR
    try:
        yield
    finally:
        num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR = calculator
