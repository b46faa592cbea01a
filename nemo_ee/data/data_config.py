# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""NeMo's forms of ``model.data.data_prefix``, brought to one: per split, weighted parts of datasets."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_ee.data.split import SPLITS
from nemo_ee.errors import ConfigError, Fault

PREFIX_KEY = "model.data.data_prefix"
SPLITS_KEY = "model.data.splits_string"


@dataclass(frozen=True)
class DatasetPart:
    """A share of one indexed dataset that goes into one split.

    Attributes:
        prefix: path without ``.bin`` and ``.idx``.
        weight: share of the blend, positive; None where the blend has no weights (then size decides).
        begin: where the part begins, as a share of the dataset's sequences.
        end: where it ends.
    """

    prefix: str
    weight: float | None
    begin: float = 0.0
    end: float = 1.0

    def sequences(self, total: int) -> tuple[int, int]:
        """First and one past the last sequence, rounded as BlendedMegatronDatasetBuilder rounds."""
        return round(self.begin * float(total)), round(self.end * float(total))


def dataset_parts(data_prefix: object, splits_string: object = None) -> dict[str, list[DatasetPart]]:
    """Parses the forms of ``data_prefix`` that NeMo's MegatronGPTModel takes.

    Args:
        data_prefix: one prefix, a list of prefixes, a flat list of weight and prefix in turns, or a mapping
            from ``train``, ``validation`` and ``test`` to any of these or to None.
        splits_string: e.g. ``"900,50,50"``; how all but the mapping are divided, by sequences in file order.

    Returns:
        Split name to its parts. A split without data is absent.

    Raises:
        ConfigError: another form, no training data, a weight that is not positive, a prefix given twice in a
            blend, or a splits string that is missing or malformed.
    """
    if isinstance(data_prefix, Mapping):
        blends = _parse_mapping(data_prefix)
        return {
            name: [DatasetPart(prefix, weight) for prefix, weight in blend] for name, blend in blends.items()
        }
    blend = _parse_blend(data_prefix, PREFIX_KEY)
    bounds = _parse_splits(splits_string)
    return {
        name: [DatasetPart(prefix, weight, begin, end) for prefix, weight in blend]
        for name, (begin, end) in bounds.items()
    }


def _parse_mapping(data_prefix: Mapping) -> dict[str, list[tuple[str, float | None]]]:
    faults = [
        Fault(f"{PREFIX_KEY}.{name}", data_prefix[name], "is not a split", f"use {', '.join(SPLITS)}")
        for name in data_prefix
        if name not in SPLITS
    ]
    for name in SPLITS:
        if name not in data_prefix:
            faults.append(
                Fault(f"{PREFIX_KEY}.{name}", None, "must be there, NeMo reads all three", "set it to null")
            )
    if data_prefix.get("train") is None:
        faults.append(Fault(f"{PREFIX_KEY}.train", None, "must name data to train on", "give the prefix"))
    if faults:
        raise ConfigError(*faults)
    given = {name: data_prefix[name] for name in SPLITS if data_prefix[name] is not None}
    for name, blend in given.items():
        if isinstance(blend, str):
            # megatron-core's get_blend_from_list would take its characters for prefixes.
            raise ConfigError(Fault(f"{PREFIX_KEY}.{name}", blend, "must be a list", f"write [{blend}]"))
    return {name: _parse_blend(blend, f"{PREFIX_KEY}.{name}") for name, blend in given.items()}


def _parse_blend(blend: object, key: str) -> list[tuple[str, float | None]]:
    items = [blend] if isinstance(blend, str) else blend
    if not isinstance(items, Sequence) or not items or any(isinstance(item, bool) for item in items):
        remedy = "write PREFIX, [PREFIX], or [WEIGHT, PREFIX, WEIGHT, PREFIX]"
        raise ConfigError(Fault(key, blend, "must name at least one dataset", remedy))
    numbers = [_as_number(item) for item in items]
    pairs: list[tuple[str, float | None]]
    if all(number is None for number in numbers):
        pairs = [(str(item).strip(), None) for item in items]
    elif len(items) % 2 == 0 and None not in numbers[::2]:
        pairs = [(str(item).strip(), weight) for item, weight in zip(items[1::2], numbers[::2], strict=True)]
        if any(weight is not None and weight <= 0 for weight in numbers[::2]):
            raise ConfigError(Fault(key, list(items), "weights must be above 0", "drop the dataset instead"))
    else:
        raise ConfigError(
            Fault(key, list(items), "must have a weight before every prefix or before none", "add it")
        )
    if len({prefix for prefix, _ in pairs}) < len(pairs):
        raise ConfigError(Fault(key, list(items), "must name each dataset once", "raise its weight instead"))
    return pairs


def _parse_splits(splits_string: object) -> dict[str, tuple[float, float]]:
    shares = [float(share) for share in re.findall(r"[.0-9]+", str(splits_string or ""))]
    if not 1 <= len(shares) <= len(SPLITS) or sum(shares) <= 0:
        rule = "must give up to three shares for training, validation and test"
        raise ConfigError(Fault(SPLITS_KEY, splits_string, rule, "e.g. '900,50,50'"))
    if shares[0] == 0:
        raise ConfigError(Fault(SPLITS_KEY, splits_string, "must leave data to train on", "e.g. '900,50,50'"))
    # Bounds add up as megatron-core adds them, so that rounding to sequences agrees.
    bounds, begin = {}, 0.0
    for name, share in zip(SPLITS, shares, strict=False):
        end = begin + share / sum(shares)
        if share > 0:
            bounds[name] = (begin, end)
        begin = end
    return bounds


def _as_number(item: object) -> float | None:
    try:
        return float(str(item))
    except ValueError:
        return None
