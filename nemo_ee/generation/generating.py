# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What generation asks of a model, and the state that the model is in meanwhile."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from nemo_ee.errors import GenerationError
from nemo_ee.runtime.upstream.sequence_parallel import sequence_parallel_off


def check_model_can_generate(model: Any) -> None:
    """Raises GenerationError for a virtual pipeline, or a backbone without its final exit."""
    if model.cfg.get("virtual_pipeline_model_parallel_size") is not None:
        raise GenerationError(
            "model.virtual_pipeline_model_parallel_size: decoding needs each stage's layers in a row; restore the "
            "checkpoint with virtual_pipeline_model_parallel_size=null"
        )
    if model.gpt.truncated:
        raise GenerationError(
            "the model lacks the layers above its last exit; restore it as MegatronGPTEarlyExitModel"
        )


def check_one_stage(model: Any) -> None:
    """Raises GenerationError for a pipeline of several stages."""
    stages = model.cfg.get("pipeline_model_parallel_size", 1)
    if stages > 1:
        raise GenerationError(
            f"model.pipeline_model_parallel_size={stages}: NeMo's loop with early exits needs all layers on one "
            "stage; call model.generate without a strategy, or restore with pipeline_model_parallel_size=1"
        )


def position_limit(cfg: Any) -> int:
    """Positions of the model: the length of learned embeddings, or what rotary ones were trained for."""
    if cfg.get("position_embedding_type", "learned_absolute") == "learned_absolute":
        return cfg.encoder_seq_length
    return max(cfg.encoder_seq_length, cfg.get("max_position_embeddings") or 0)


USUAL_LENGTH = 2048
"""Positions that are reserved for a sequence where nobody says how many, if the model has as many."""


@contextmanager
def generating(model: Any, no_gradients: Callable = torch.inference_mode) -> Iterator[None]:
    """Eval mode, no gradients, no sequence parallelism, autocast as in NeMo's forward; restored on leaving.

    Args:
        model: a `MegatronGPTEarlyExitModel`.
        no_gradients: `torch.no_grad` where results are changed in place outside.
    """
    gpt = model.gpt
    training = [module for module in gpt.modules() if module.training]
    gpt.eval()
    config = gpt.config
    try:
        with ExitStack() as stack:
            stack.enter_context(no_gradients())
            stack.enter_context(sequence_parallel_off(gpt))
            if config.enable_autocast:
                device = next(gpt.parameters()).device.type
                stack.enter_context(torch.autocast(device, dtype=config.autocast_dtype))
            yield
    finally:
        for module in training:
            module.training = True
