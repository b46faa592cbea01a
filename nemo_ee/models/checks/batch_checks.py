# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Checks of what batches are like: their sizes while they grow, the documents that share a sequence, and how
many of them are for validation."""

from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

from nemo_ee.data.data_config import dataset_parts
from nemo_ee.errors import ConfigError, Fault
from nemo_ee.models.checks.fine_tuning_checks import is_fine_tuning

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
        yield Fault(RAMP_UP, ramp, rule, f"write e.g. [16, 16, 100000], or null: set ++{RAMP_UP}=null")
        return
    start, increment, samples = ramp
    each = cfg.micro_batch_size * data_parallel
    for what, size in (("start", start), ("increment", increment)):
        if size % each:
            rule = f"{what} {size} must be a multiple of micro_batch_size x data-parallel size = {each}"
            fits = each * max(1, size // each)
            both = {"start": start, "increment": increment, what: fits}
            whole = f"'++{RAMP_UP}=[{both['start']},{both['increment']},{samples}]'"
            yield Fault(RAMP_UP, ramp, rule, f"use e.g. {fits}: set {whole}")
    if start >= full or (full - start) % increment:
        rule = f"increments of {increment} must lead from {start} to model.global_batch_size={full}"
        yield Fault(RAMP_UP, ramp, rule, f"change one of the three, or set ++{RAMP_UP}=null")


def document_faults(cfg: DictConfig, fine_tuning: bool = False) -> Iterator[Fault]:
    """Settings that keep documents of one sequence apart, where they would change nothing.

    Args:
        cfg: model configuration.
        fine_tuning: whether fine-tuning data can be read.
    """
    from nemo_ee.modeling.specs import have_transformer_engine

    data = cfg.get("data") or {}
    for key in ("train_ds", "validation_ds"):
        if data.get(key) is not None and not fine_tuning:
            rule = "is read in tuning alone (scripts/megatron_gpt_ee_tuning.py)"
            remedy = "use data_prefix; reset_attention_mask keeps documents of a sequence apart"
            yield Fault(f"model.data.{key}", "…", rule, remedy)
    apart = data.get("reset_attention_mask", False)
    if apart and cfg.get("get_attention_mask_from_fusion", True):
        rule = "would change nothing: attention makes a causal mask of its own"
        remedy = (
            "set ++model.get_attention_mask_from_fusion=false, or ++model.data.reset_attention_mask=false"
        )
        yield Fault("model.data.reset_attention_mask", True, rule, remedy)
    if apart and cfg.get("transformer_engine", False) and have_transformer_engine():
        rule = "would change nothing: Transformer Engine's causal attention reads no mask"
        remedy = "set ++model.transformer_engine=false, or ++model.data.reset_attention_mask=false"
        yield Fault("model.data.reset_attention_mask", True, rule, remedy)
    rotary = cfg.get("position_embedding_type", "learned_absolute") == "rope"
    if data.get("reset_position_ids", False) and rotary and not apart:
        rule = "would change nothing: rotary embeddings see the distances of positions alone"
        remedy = "set ++model.data.reset_position_ids=false, or ++model.data.reset_attention_mask=true"
        yield Fault("model.data.reset_position_ids", True, rule, remedy)


def validation_faults(trainer: DictConfig, data: DictConfig | None) -> Iterator[Fault]:
    """Numbers of steps and of batches that are none, and shares of what has no end.

    Args:
        trainer: the `trainer` section; of a script that does not train it lacks these keys.
        data: the `model.data` section, if there is one.
    """
    interval, limit = trainer.get("val_check_interval"), trainer.get("limit_val_batches")
    steps = trainer.get("max_steps")
    trains = data is not None and (data.get("data_prefix") is not None or is_fine_tuning(data))
    if trains and steps is not None and steps < 0:
        rule = "datasets are built for a number of steps"
        yield Fault("trainer.max_steps", steps, rule, "set it to 1 or more")
        return
    for key, value, least in (("val_check_interval", interval, 1), ("limit_val_batches", limit, 0)):
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        share = isinstance(value, float) and (0.0 < value <= 1.0 or value == least == 0)
        if value is not None and not (whole or share):
            what = "steps, or a share of trainer.max_steps" if least else "global batches, or a share of all"
            remedy = f"use {least} or more, or a share above 0.0 and at most 1.0"
            yield Fault(f"trainer.{key}", value, f"must be a number of {what}", remedy)
    if isinstance(limit, float) and 0.0 < limit <= 1.0 and _is_weighted(data):
        rule = "a weighted blend has no end that this could be a share of"
        remedy = "use a number of global batches, e.g. trainer.limit_val_batches=50"
        yield Fault("trainer.limit_val_batches", limit, rule, remedy)


def _is_weighted(data: DictConfig | None) -> bool:
    """Whether the validation data is a blend with weights; what is wrong with its form is said elsewhere."""
    if data is None or data.get("data_prefix") is None:
        return False
    prefix = data.data_prefix
    try:
        parts = dataset_parts(
            OmegaConf.to_container(prefix) if OmegaConf.is_config(prefix) else prefix,
            data.get("splits_string"),
        )
    except ConfigError:
        return False
    return any(part.weight is not None for part in parts.get("validation", ()))


def validation_interval(trainer: DictConfig) -> int:
    """Steps between validations, of a share: Megatron's training data is as long as the run, so what is a share
    of the training data to Lightning is one of `max_steps`."""
    return max(1, int(trainer.val_check_interval * trainer.max_steps))
