# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Checks of what batches are like: their sizes while they grow, and the documents that share a sequence."""

from collections.abc import Iterator

from omegaconf import DictConfig

from nemo_ee.errors import Fault

RAMP_UP = "model.rampup_batch_size"


def ramp_up_faults(cfg: DictConfig, data_parallel: int) -> Iterator[Fault]:
    """What Megatron's batch size ramp-up asserts, or answers with a division by zero.

    Args:
        cfg: model configuration.
        data_parallel: data-parallel size.
    """
    ramp, full = cfg.get("rampup_batch_size"), cfg.get("global_batch_size")
    if not ramp:
        return
    if len(ramp) != 3 or not all(isinstance(number, int) and number > 0 for number in ramp):
        rule = "must be [start, increment, samples], numbers above 0"
        yield Fault(RAMP_UP, ramp, rule, "write e.g. [16, 16, 100000], or null")
        return
    start, increment, _ = ramp
    each = cfg.micro_batch_size * data_parallel
    for what, size in (("start", start), ("increment", increment)):
        if size % each:
            rule = f"{what} {size} must be a multiple of micro_batch_size x data-parallel size = {each}"
            yield Fault(RAMP_UP, ramp, rule, f"use e.g. {each * max(1, size // each)}")
    if start >= full or (full - start) % increment:
        rule = f"increments of {increment} must lead from {start} to model.global_batch_size={full}"
        yield Fault(RAMP_UP, ramp, rule, "change one of the three, or set it to null")


def document_faults(cfg: DictConfig) -> Iterator[Fault]:
    """Settings that keep documents of one sequence apart, where they would change nothing."""
    from nemo_ee.megatron.specs import have_transformer_engine

    data = cfg.get("data") or {}
    for key in ("train_ds", "validation_ds"):
        if data.get(key) is not None:
            rule = "is read by NeMo's fine-tuning, which packs sequences for Transformer Engine; not here"
            remedy = "use data_prefix; reset_attention_mask keeps documents of a sequence apart"
            yield Fault(f"model.data.{key}", "…", rule, remedy)
    apart = data.get("reset_attention_mask", False)
    if apart and cfg.get("get_attention_mask_from_fusion", True):
        rule = "would change nothing: attention makes a causal mask of its own"
        remedy = "set model.get_attention_mask_from_fusion to false, or this to false"
        yield Fault("model.data.reset_attention_mask", True, rule, remedy)
    if apart and cfg.get("transformer_engine", False) and have_transformer_engine():
        rule = "would change nothing: Transformer Engine's causal attention reads no mask"
        remedy = "set model.transformer_engine to false, or this to false"
        yield Fault("model.data.reset_attention_mask", True, rule, remedy)
    rotary = cfg.get("position_embedding_type", "learned_absolute") == "rope"
    if data.get("reset_position_ids", False) and rotary and not apart:
        rule = "would change nothing: rotary embeddings see the distances of positions alone"
        remedy = "set it to false, or reset_attention_mask to true"
        yield Fault("model.data.reset_position_ids", True, rule, remedy)
