# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What parity tests of tuning compare with."""

import math

import pytest

from tests.support.tuning import worst_of


@pytest.mark.parametrize("gaps", [(math.nan, 0.0), (0.0, math.nan), (0.0, 1.0, math.nan, 2.0)])
def test_a_nan_is_the_worst_difference(gaps):
    assert math.isnan(worst_of(*gaps))


def test_the_largest_difference():
    assert worst_of(0.0, 3.0, 1.0) == 3.0
