# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A model in one process whose exits' predictions of given text are measured: what its files say, and its scores."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from nemo_ee.config import EarlyExitConfig
from nemo_ee.decoding.decoding_model import asked_heads
from nemo_ee.errors import CheckpointError, ConfigError, Fault
from nemo_ee.evaluation.teacher_forced import TextScores, score_text
from nemo_ee.generation.generating import generating
from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel
from nemo_ee.running.restore import Source, read_exits, restore_model

Score = Callable[[Tensor, Tensor], TextScores]
"""Tokens and the tokens that follow them, [B, S] each, to scores."""
ANY_VOCABULARY = 1 << 31
"""Bounds token ids where the model is not yet known."""


class Scored(Source, Protocol):
    """Settings of a script that measures a model's exits on text."""

    @property
    def precision(self) -> str | int: ...


def check_files(
    config: Scored, purpose: str, key: str, exits: tuple[int, ...] | None, length: int
) -> tuple[Any, EarlyExitConfig, list[Fault]]:
    """What the files' own configurations say, and which settings they show to be wrong.

    Args:
        config: names the files.
        purpose: what the script does with the exits, in a word.
        key: of `exits`.
        exits: those that the settings name, if any.
        length: `data.seq_length`, tokens of a piece of text.

    Returns:
        The base's configuration, the exits', and faults.

    Raises:
        CheckpointError: a file that cannot be read, or there are no exits.
    """
    base, early_exit = read_exits(config)
    if not early_exit.layers:
        raise CheckpointError(f"{config.gpt_model_file}: has no exits to {purpose}; set adapter_file")
    faults, limit = [], base.encoder_seq_length
    if exits is not None and (not exits or not set(exits) <= set(early_exit.layers)):
        rule = f"not all of the model's exits {list(early_exit.layers)}"
        faults.append(Fault(key, list(exits), rule, "name exit layers that exist, or null"))
    if length > limit:
        rule = f"exceeds the model's encoder_seq_length={limit}"
        faults.append(Fault("data.seq_length", length, rule, f"use at most {limit}"))
    return base, early_exit, faults


def restore(config: Scored, trainer: Any) -> MegatronGPTEarlyExitModel:
    """The model with its exits, in eval mode.

    Raises:
        ConfigError: the trainer has several processes.
        CheckpointError: see `restore_model`.
    """
    if trainer.world_size != 1:
        rule = f"x trainer.num_nodes={trainer.num_nodes}: measuring exits runs in one process"
        raise ConfigError(Fault("trainer.devices", trainer.num_devices, rule, "set both to 1"))
    return restore_model(config.gpt_model_file, config.adapter_file, trainer, {"precision": config.precision})


def score_with(model: MegatronGPTEarlyExitModel) -> Score:
    """`score_text` on the model's device, with what generation switches off, by heads as prepared decoding asks."""
    device = model.gpt.output_weight().device
    with generating(model):
        heads = asked_heads(model.gpt)

    def score(tokens: Tensor, labels: Tensor) -> TextScores:
        with generating(model):
            return score_text(model.gpt, tokens.to(device), labels.to(device), heads)

    return score
