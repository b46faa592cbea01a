# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""How a GGUF file scales rotary positions, in transformers' terms.

Two independent mechanisms: a factor for all frequencies (``rope.scaling.*``), and the tensor
``rope_freqs.weight``, in which llama.cpp's converter keeps Llama 3's frequency-dependent divisors without the
four numbers they came from.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nemo_ee.checkpoint.gguf.keys import REMEDY, shown
from nemo_ee.errors import CheckpointError

FREQUENCIES = "rope_freqs.weight"
_TOLERANCE = 1e-5  # relative, of divisors computed and kept in fp32


def scaling(
    values: Mapping[str, Any], architecture: str, divisors: np.ndarray | None, dimension: int, base: float
) -> dict[str, Any] | None:
    """The ``rope_scaling`` of a transformers configuration.

    Args:
        values: all keys of the file.
        architecture: prefix of the model's keys.
        divisors: ``rope_freqs.weight`` [dimension / 2], or None.
        dimension: rotated width of a head.
        base: ``rope_theta``.

    Returns:
        None for unscaled positions.

    Raises:
        CheckpointError: a scaling that megatron-core has not, or a tensor that is not Llama 3's.
    """
    prefix = f"{architecture}.rope.scal"
    # llama.cpp's order and defaults: linear where no type is given, and 0 for no factor
    kind = values.get(f"{prefix}ing.type", "linear")
    factor_key = f"{prefix}ing.factor" if f"{prefix}ing.factor" in values else f"{prefix}e_linear"
    given = values.get(factor_key, 0.0)
    if not is_number(given) or given < 0:
        raise CheckpointError(
            f"{factor_key}={shown(given)}: must be a finite number, and not below 0; {REMEDY}"
        )
    factor = float(given) or 1.0
    if kind not in ("none", "linear"):
        raise CheckpointError(
            f"{prefix}ing.type={shown(kind)}: must be none or linear, for megatron-core has no other; "
            "convert a checkpoint without it"
        )
    linear = kind == "linear" and factor != 1.0
    if divisors is not None and not (divisors.shape == (dimension // 2,) and np.all(divisors == 1.0)):
        if linear:
            raise CheckpointError(
                f"{factor_key}={factor:g}: must be 1 beside the tensor {FREQUENCIES}; {REMEDY}"
            )
        return _llama3(divisors, dimension, base)
    return {"rope_type": "linear", "factor": factor} if linear else None


def is_number(value: Any) -> bool:
    """Whether a key's value is a finite number; damaged files may hold anything."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def llama3_divisors(settings: Mapping[str, float], dimension: int, base: float) -> np.ndarray:
    """What Llama 3 divides each rotary frequency by [dimension / 2].

    Source: transformers' ``_compute_llama3_parameters``; llama.cpp's ``LlamaModel.generate_extra_tensors``.
    """
    factor, low, high = (settings[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = settings["original_max_position_embeddings"] / _wavelengths(dimension, base)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _wavelengths(dimension: int, base: float) -> np.ndarray:
    return 2.0 * math.pi * base ** (np.arange(0, dimension, 2) / dimension)


def _llama3(divisors: np.ndarray, dimension: int, base: float) -> dict[str, Any]:
    divisors = divisors.astype(np.float64)
    if divisors.shape == (dimension // 2,):
        for settings in _candidates(divisors, dimension, base):
            if np.allclose(llama3_divisors(settings, dimension, base), divisors, rtol=_TOLERANCE, atol=0.0):
                return {"rope_type": "llama3", **settings}
    raise CheckpointError(
        f"{FREQUENCIES}: must hold the {dimension // 2} frequency divisors of a Llama 3 scaling; {REMEDY}"
    )


def _candidates(divisors: np.ndarray, dimension: int, base: float) -> Iterator[dict[str, Any]]:
    """Settings that may have made these divisors, the likeliest first.

    They depend on ``original / low`` and ``original / high`` alone, so ``low`` is 1 without loss.
    """
    factor = float(f"{divisors.max():.6g}")

    def settings(original: float, high: float) -> dict[str, Any]:
        return {
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }

    for exponent in (13, *range(4, 13), *range(14, 21)):  # Llama 3's 8192 first
        yield settings(2**exponent, 4.0)
    between = (divisors > 1.0 + _TOLERANCE) & (divisors < factor * (1.0 - _TOLERANCE))
    if between.sum() >= 2:  # smooth = original / (high - 1) / wavelength - 1 / (high - 1): a line
        smooth = (1.0 / divisors[between] - 1.0 / factor) / (1.0 - 1.0 / factor)
        slope, offset = np.polyfit(1.0 / _wavelengths(dimension, base)[between], smooth, 1)
        high = 1.0 - 1.0 / offset
        original = slope * (high - 1.0)
        yield settings(round(original), float(f"{high:.3g}"))
        yield settings(float(original), float(high))
