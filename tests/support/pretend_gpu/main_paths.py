# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What is run on the CPU and on a pretend GPU, to be compared: the same functions, by ranks of either pool.

All results are the host's. Weights depend on names alone, so both start from the same model.
"""

import dataclasses
from typing import Any

import torch

from tests.support import pretraining, tuning
from tests.support.tiny_gpt import HEADS, tiny_model, tiny_model_config

TEXTS = ["w1 w2 w3", "w9 w10 w11 w12 w13 w14 w15", "w40"]
LENGTH = dict(max_length=16)
GREEDY = dict(use_greedy=True, add_BOS=False)
REQUESTS: dict[str, tuple[dict, Any]] = {
    "exits": (GREEDY, dict(threshold=[0.6, 0.5, 0.7])),
    "lossless": (GREEDY, dict(threshold=0.3, lossless=True)),
    "full depth": (GREEDY, False),
    "sampled": (dict(use_greedy=False, add_BOS=False, temperature=0.9, top_k=20, top_p=0.9), dict(threshold=0.5)),
    "sampled, lossless": (dict(use_greedy=False, add_BOS=False), dict(threshold=0.3, lossless=True)),
    "probabilities": ({**GREEDY, "all_probs": True, "compute_logprob": False}, dict(threshold=0.5)),
}
"""Sampling parameters and `early_exit` of calls of `model.generate`."""


def on_host(value: Any) -> Any:
    """The same with all tensors on the host."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: on_host(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_host(each) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: on_host(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def tiny(head: str, **overrides: Any) -> Any:
    """The tiny model with exits of one kind; embeddings are tied where the exits are."""
    tied = HEADS[head]["projection"] == "tied"
    config = tiny_model_config(head=HEADS[head], share_embeddings_and_output_weights=tied, **overrides)
    model = tiny_model(config)
    return model.cuda() if torch.cuda.is_available() else model


def generated(heads: list[str]) -> dict[str, dict[str, Any]]:
    """Head -> request -> what `model.generate` returned."""
    return {head: answers(tiny(head)) for head in heads}


def answers(model: Any) -> dict[str, Any]:
    """Request -> what `model.generate` returned."""
    found = {}
    for name, (sampling, early_exit) in REQUESTS.items():
        generator = torch.Generator().manual_seed(3)
        found[name] = model.generate(TEXTS, LENGTH, sampling, early_exit=early_exit, generator=generator)
    return on_host(found)


def tuned(*args: Any) -> dict[str, tuning.Outcome]:
    """`tests.support.tuning.tune` in float32."""
    return on_host(tuning.tune(*args, torch.float32))


def pretrained(*args: Any, dtype: torch.dtype = torch.float32) -> dict[str, pretraining.Outcome]:
    """`tests.support.pretraining.pretrain` with parameters of a type."""
    return on_host(pretraining.pretrain(*args, False, dtype))
