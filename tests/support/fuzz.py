# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Running a check of hypothesis's examples, few of them always and many on request."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

FEW, MANY = 200, 10_000
EXAMPLES = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]
"""Parameters of a test of examples."""
MOST_MS = 1000
"""That a check may take of one example."""


def fuzz(strategy: SearchStrategy, check: Callable[[Any], Any], examples: int) -> None:
    """Checks examples; where they are few, always the same ones.

    Args:
        strategy: makes them.
        check: raises for those that it does not stand.
        examples: how many.
    """

    @settings(
        max_examples=examples,
        deadline=MOST_MS,
        database=None,
        derandomize=examples < MANY,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(example: Any) -> None:
        check(example)

    run()
