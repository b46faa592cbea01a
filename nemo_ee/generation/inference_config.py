# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""NeMo's `inference` section, as `model.set_inference_config` takes it, for `model.generate`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from nemo_ee.errors import ConfigError, Fault

OWN_NAMES = {
    "max_length": "tokens_to_generate",
    "min_length": "min_tokens_to_generate",
    "use_greedy": "greedy",
}
"""What NeMo's section calls parameters that have another name in `generate`."""
DEFAULTS = {"greedy": False, "tokens_to_generate": 0, "min_tokens_to_generate": 0, "top_p": 0.0}
"""NeMo 2.4.1's for keys that are not given, where ours are others; but a text begins as the model's rule says."""
NOT_OURS = ("inputs", "image_list", "batch_size", "outfile_path")
"""Keys that NeMo's functions have beside, and that say nothing of how a batch is generated."""


def generate_arguments(section: Mapping) -> dict[str, Any]:
    """`length_params`, `sampling_params`, `early_exit`, `generator` and `strategy` of `model.generate`.

    Args:
        section: NeMo's keys, and `early_exit` as for `model.generate`.

    Raises:
        ConfigError: a seed that is none.
    """
    values = {**DEFAULTS, **{key: section[key] for key in section if section[key] is not None}}
    names = {own: name for name, own in OWN_NAMES.items()}
    lengths = {names[key]: values.pop(key) for key in ("tokens_to_generate", "min_tokens_to_generate")}
    more = {key: values.pop(key) for key in ("early_exit", "strategy") if key in values}
    seed = values.pop("random_seed", None)
    if seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise ConfigError(
                Fault("inference_config.random_seed", seed, "must be a whole number", "use e.g. 1234")
            )
        more["generator"] = torch.Generator().manual_seed(seed)
    sampling = {names.get(key, key): value for key, value in values.items() if key not in NOT_OURS}
    return {"length_params": lengths, "sampling_params": sampling, **more}


def in_own_keys(error: ConfigError, section: str) -> ConfigError:
    """What `parse_request` found in such arguments, under the keys of the section that the user wrote."""
    return ConfigError(*(replace(fault, key=_own_key(fault.key, section)) for fault in error.faults))


def _own_key(key: str, section: str) -> str:
    kind, _, name = key.partition(".")
    if kind not in ("length_params", "sampling_params"):
        return key
    return f"{section}.{OWN_NAMES.get(name, name)}"
