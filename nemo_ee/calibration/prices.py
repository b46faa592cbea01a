# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The prices by which thresholds are compared: of this machine, or from a file."""

from collections.abc import Sequence
from pathlib import Path

from nemo_ee.calibration.settings import CalibrationConfig
from nemo_ee.decoding.assumed_prices import assumed_prices
from nemo_ee.decoding.pass_prices import PassPrices
from nemo_ee.errors import ConfigError, Fault
from nemo_ee.generation.generating import generating
from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel


def read_prices(path: str, num_layers: int, exits: Sequence[int]) -> PassPrices:
    """Prices of a file.

    Args:
        path: of a file that decoding or a calibration has written.
        num_layers: of the model.
        exits: that need a price.

    Raises:
        ConfigError: it is no such file, or of another model.
    """
    prices = PassPrices.read(Path(path), "prices_file")
    if prices.num_layers != num_layers or not set(exits) <= set(prices.exits):
        rule = (
            f"has prices of {prices.num_layers} layers and exits {list(prices.exits)}, not of this model's "
            f"{num_layers} and {list(exits)}"
        )
        raise ConfigError(Fault("prices_file", path, rule, "set prices_file=null: they are then measured"))
    return prices


def prices_here(config: CalibrationConfig, model: MegatronGPTEarlyExitModel) -> PassPrices:
    """Prices of decoding with this model on this machine.

    Raises:
        NotImplementedError: it cannot decode with `config.weights`.
    """
    model.prepare_decoding(config.weights)
    with generating(model):
        prices = assumed_prices(model.decoding_model())
    model.release_decoding()
    return prices
