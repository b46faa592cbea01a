# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Trainers and the tests' tiny model, whose weights depend on names alone, on the device of this process."""

from typing import Any

from omegaconf import OmegaConf

from nemo_ee.models.runs.trainer_builder import EarlyExitTrainerBuilder
from tests.support.tiny_gpt import fill, tiny_model_config


def trainer(precision: Any = 32, **settings: Any) -> Any:
    """What the scripts use, on the GPU or, where none is seen, on the CPU; it writes nothing.

    Args:
        precision: NeMo's.
        **settings: of the `trainer` section.
    """
    section = {"devices": 1, "num_nodes": 1, "precision": precision, "logger": False}
    section |= {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    section |= {"use_distributed_sampler": False, **settings}
    cfg = OmegaConf.create({"trainer": section, "model": {"precision": precision}})
    return EarlyExitTrainerBuilder(cfg).create_trainer()


def model(**settings: Any) -> Any:
    """A `MegatronGPTEarlyExitModel` in float32, in eval mode.

    Args:
        **settings: of `tiny_model_config`.
    """
    from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel

    built = MegatronGPTEarlyExitModel(tiny_model_config(**settings), trainer())
    fill(built)
    return built.eval()


def prepare(model: Any, graphs: bool, rows: int, length: int) -> Any:
    """Prepares decoding for so many sequences and positions of each; returns what `generate` then uses."""
    model.prepare_decoding(cuda_graphs=graphs, rows=rows, max_length=length)
    return model._decoding_model
