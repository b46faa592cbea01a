# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""When a token leaves at an exit: the one rule of decoding, calibration and evaluation."""

from typing import Any

NEVER = 1.0
"""A threshold: the exit is not asked."""


def is_asked(threshold: Any) -> Any:
    """Whether an exit with that threshold is asked at all."""
    return threshold < NEVER


def leaves(confidence: Any, threshold: Any) -> Any:
    """Whether a token leaves: its confidence lies strictly above the threshold, and that is not `NEVER`. NaN stays.

    Args:
        confidence: a number, or an array or tensor of them in float64: in a narrower type a threshold rounds.
        threshold: likewise, of a shape that broadcasts.
    """
    return (confidence > threshold) & is_asked(threshold)
