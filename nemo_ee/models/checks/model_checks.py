# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What a model configuration must satisfy, checked before anything is allocated."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_ee.config import EarlyExitConfig, parse_early_exit
from nemo_ee.errors import ConfigError, Fault
from nemo_ee.models.checks.batch_checks import RAMP_UP, document_faults, ramp_up_faults
from nemo_ee.models.checks.fine_tuning_checks import fine_tuning_faults, is_fine_tuning
from nemo_ee.models.checks.key_rules import (
    ANY_MODEL,
    CUSTOMIZATION,
    OTHER_CHECKPOINT,
    PRETRAINING,
    TUNING,
    key_faults,
)
from nemo_ee.training.bubble_plan import most_fills

LAYER_SPECS = ("", "te_gpt", "decoder_block_gpt")
"""NeMo's names (`model.name`) of megatron-core's plain GPT layers."""


def read_early_exit(cfg: DictConfig, vocab_size: int | None = None) -> EarlyExitConfig:
    """The parsed `early_exit` section of a model configuration; without one, a model without exits.

    Raises:
        ConfigError: listing every fault.
    """
    if cfg.get("early_exit") is None:
        return EarlyExitConfig(layers=())
    return parse_early_exit(OmegaConf.to_container(cfg.early_exit, resolve=True), cfg.num_layers, vocab_size)


@contextmanager
def from_checkpoint(path: str | os.PathLike) -> Iterator[None]:
    """Around the restoring of a checkpoint by a script that has no `model` keys: faults are the file's.

    Raises:
        ConfigError: with remedies that such a script can follow.
    """
    try:
        yield
    except ConfigError as error:
        raise ConfigError(*(_of_checkpoint(fault, path) for fault in error.faults)) from None


def _of_checkpoint(fault: Fault, path: str | os.PathLike) -> Fault:
    if "++model." not in fault.remedy:
        return fault
    remedy = (
        f"run it where there are these, or {OTHER_CHECKPOINT}" if "needs" in fault.rule else OTHER_CHECKPOINT
    )
    return replace(fault, rule=f"{fault.rule} ({path} says so)", remedy=remedy)


def check_model(cfg: DictConfig, world_size: int, layers: int | None = None) -> None:
    """Checks that this is a model that exits can be built on, and its sizes against the parallel layout.

    Args:
        cfg: model configuration.
        world_size: number of processes.
        layers: transformer layers that will be built, if not `num_layers`.

    Raises:
        ConfigError: listing every fault.
    """
    faults = list(_layout_faults(cfg, world_size)) + list(_split_faults(cfg, layers or cfg.num_layers))
    faults += _backbone_faults(cfg)
    if not cfg.get("mcore_gpt", False):
        rule = "exits are built on megatron-core's GPT"
        faults.append(
            Fault("model.mcore_gpt", cfg.get("mcore_gpt"), rule, "convert the checkpoint to megatron-core")
        )
    faults += key_faults(cfg, ANY_MODEL)
    if faults:
        raise ConfigError(*faults)


def _backbone_faults(cfg: DictConfig) -> Iterator[Fault]:
    """What NeMo would build differently, so that the checkpoint's weights would mean something else here."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_ee.modeling.fusions import missing_fusions
    from nemo_ee.modeling.specs import have_transformer_engine

    if (name := cfg.get("name") or "") not in LAYER_SPECS:
        rule = "names layers other than megatron-core's plain GPT's, which exits are built on"
        yield Fault("model.name", name, rule, OTHER_CHECKPOINT)
    custom = {
        key: value for key, value in (cfg.get(CUSTOMIZATION) or {}).items() if value not in (None, False)
    }
    known = {field.name for field in dataclasses.fields(TransformerConfig)} | {rule.key for rule in ANY_MODEL}
    for key in custom.keys() - known:
        rule = "is unknown to megatron-core's plain GPT: the model would be another"
        off = f"++model.{CUSTOMIZATION}.{key}=null"
        remedy = f"use another checkpoint; or, if its weights are of a model without, set {off}"
        yield Fault(f"model.{CUSTOMIZATION}.{key}", custom[key], rule, remedy)
    for key, needs in missing_fusions(cfg.get("transformer_engine", False)).items():
        if key in custom and not key.startswith("bias_"):  # those two run anywhere, only slower than without
            key = f"{CUSTOMIZATION}.{key}"
            yield Fault(
                f"model.{key}", OmegaConf.select(cfg, key), f"needs {needs}", f"set ++model.{key}=null"
            )
    in_custom = "window_size" in custom
    window = custom["window_size"] if in_custom else cfg.get("window_size")
    if window is not None and not (cfg.get("transformer_engine", False) and have_transformer_engine()):
        key = f"model.{CUSTOMIZATION}.window_size" if in_custom else "model.window_size"
        rule = "attention within a window needs model.transformer_engine=true, Transformer Engine and a GPU"
        yield Fault(key, window, rule, f"set ++{key}=null if no sequence exceeds the window")


def _layout_faults(cfg: DictConfig, world_size: int):
    tp, pp = cfg.get("tensor_model_parallel_size", 1), cfg.get("pipeline_model_parallel_size", 1)
    for key, size in (("tensor_model_parallel_size", tp), ("pipeline_model_parallel_size", pp)):
        if size < 1:
            yield Fault(f"model.{key}", size, "must be at least 1", f"set ++model.{key}=1 or more")
            return
    if world_size % (tp * pp):
        rule = f"{tp} x pipeline_model_parallel_size={pp} does not divide the {world_size} processes"
        yield Fault(
            "model.tensor_model_parallel_size", tp, rule, "change trainer.devices x num_nodes, or the sizes"
        )
        return
    groups = cfg.get("num_query_groups") or cfg.num_attention_heads
    for key, count in (("num_attention_heads", cfg.num_attention_heads), ("num_query_groups", groups)):
        if count % tp:
            rule = f"does not divide model.{key}={count}"
            sizes = [n for n in range(1, groups + 1) if not groups % n and not cfg.num_attention_heads % n]
            remedy = f"use one of {sizes}"
            yield Fault("model.tensor_model_parallel_size", tp, rule, remedy)
            break
    if cfg.get("kv_channels") is None and cfg.hidden_size % cfg.num_attention_heads:
        rule = f"does not divide model.hidden_size={cfg.hidden_size}, and model.kv_channels is not given"
        fits = max(n for n in range(1, cfg.num_attention_heads) if not cfg.hidden_size % n)
        remedy = f"use a divisor: set ++model.num_attention_heads={fits}"
        yield Fault("model.num_attention_heads", cfg.num_attention_heads, rule, remedy)
    if cfg.ffn_hidden_size % tp:
        rule = f"does not divide model.ffn_hidden_size={cfg.ffn_hidden_size}"
        yield Fault("model.tensor_model_parallel_size", tp, rule, "use a divisor")
    if cfg.get("sequence_parallel", False) and cfg.encoder_seq_length % tp:
        rule = f"sequence parallelism splits it over tensor_model_parallel_size={tp}"
        remedy = f"use a multiple of {tp}: set ++model.encoder_seq_length={cfg.encoder_seq_length // tp * tp or tp}"
        yield Fault("model.encoder_seq_length", cfg.encoder_seq_length, rule, remedy)
    dp, micro, batch = world_size // (tp * pp), cfg.get("micro_batch_size"), cfg.get("global_batch_size")
    for key, size, least in (("micro_batch_size", micro, 1), ("global_batch_size", batch, (micro or 1) * dp)):
        if size is not None and size < 1:
            yield Fault(f"model.{key}", size, "must be at least 1", f"set ++model.{key}={least} or more")
            return
    if micro and batch and batch % (micro * dp):
        rule = f"must be a multiple of micro_batch_size={micro} x data-parallel size {dp}"
        fits = micro * dp * max(1, batch // (micro * dp))
        yield Fault("model.global_batch_size", batch, rule, f"set ++model.global_batch_size={fits}")
    elif micro and batch:
        yield from ramp_up_faults(cfg, dp)


def _split_faults(cfg: DictConfig, layers: int):
    stages, rest = cfg.get("pipeline_model_parallel_size", 1), layers
    if stages < 1:
        return  # a fault of the layout
    uneven = []
    for place in ("first", "last"):
        count = cfg.get(f"num_layers_in_{place}_pipeline_stage")
        if count is not None and count < 1:
            key = f"model.num_layers_in_{place}_pipeline_stage"
            yield Fault(key, count, "a stage has at least one layer", f"use 1 or more, or set ++{key}=null")
            return
        if count is not None:
            stages, rest = stages - 1, rest - count
            uneven.append(f"num_layers_in_{place}_pipeline_stage={count}")
    fits = rest == 0 if stages <= 0 else rest > 0 and rest % stages == 0
    if not fits:
        what = f"{layers} layers" if layers == cfg.num_layers else f"{layers} layers (up to the last exit)"
        rule = f"{what}{' with ' + ', '.join(uneven) if uneven else ''} do not divide into equal stages"
        remedy = "use a divisor, or set model.num_layers_in_first_pipeline_stage or …_last_…"
        yield Fault(
            "model.pipeline_model_parallel_size", cfg.get("pipeline_model_parallel_size", 1), rule, remedy
        )


def fuses_gelu(cfg: DictConfig) -> bool:
    """Whether megatron-core's fused kernel computes the activation GELU, and so approximates it (`tanh_gelu`)."""
    has_kernel = cfg.get("bias", True) or cfg.get("activation", "gelu").endswith("glu")
    return cfg.get("bias_activation_fusion", True) and has_kernel


def machine_settings(cfg: DictConfig) -> dict[str, bool | None]:
    """The settings that `adapt_to_machine` may change; None for those that the configuration lacks."""
    from nemo_ee.modeling.fusions import FUSIONS

    return {key: cfg.get(key) for key in ("use_cpu_initialization", "transformer_engine", *FUSIONS)}


def adapt_to_machine(cfg: DictConfig) -> list[str]:
    """Turns off what this machine lacks or does not need; returns what that was.

    A checkpoint may come from another machine: weights made on the CPU would stay there, beside a GPU.
    """
    from nemo_ee.modeling.fusions import missing_fusions
    from nemo_ee.modeling.specs import have_transformer_engine

    changed, gpu = [], torch.cuda.is_available()
    missing = missing_fusions(cfg.get("transformer_engine", False))
    if not have_transformer_engine():
        missing["transformer_engine"] = "Transformer Engine and a GPU"
    with open_dict(cfg):
        if gpu and cfg.get("use_cpu_initialization", False):
            changed.append("model.use_cpu_initialization (there is a GPU)")
        cfg.use_cpu_initialization = not gpu
        for key, needs in missing.items():
            if cfg.get(key, False):
                changed.append(f"model.{key} (needs {needs})")
            cfg[key] = False
    return changed


def _no_exit_faults(cfg: DictConfig, early_exit: EarlyExitConfig, what: str) -> list[Fault]:
    if early_exit.layers:
        return []
    remedy = f"name layers, e.g. '++model.early_exit.layers=[{max(1, cfg.num_layers // 2)}]'"
    return [Fault("model.early_exit", cfg.get("early_exit"), f"there is no exit to {what}", remedy)]


def check_tuning(cfg: DictConfig) -> None:
    """Checks what tuning adds to `check_model`.

    Raises:
        ConfigError: listing every fault.
    """
    early_exit = read_early_exit(cfg)
    faults = _no_exit_faults(cfg, early_exit, "tune")
    several = isinstance(early_exit.head, tuple)
    for i, head in enumerate(early_exit.head if several else [early_exit.head]):
        has_bucket = head.projection == "shortlist"
        if not (
            head.block
            or head.mlp != "none"
            or head.norm
            or head.linear
            or head.train_projection
            or has_bucket
        ):
            rule, entry = "no exit parameter would be tuned", f".{i}" if several else ""
            remedy = f"turn on one of block, mlp, norm, linear, e.g. ++model.early_exit.head{entry}.norm=true"
            name = f"model.early_exit.head[{i}]" if several else "model.early_exit.head"
            faults.append(Fault(name, str(head), rule, remedy))
    faults += key_faults(cfg, TUNING)
    faults += document_faults(cfg, fine_tuning=True)
    faults += fine_tuning_faults(cfg)
    if (data := cfg.get("data")) is not None and not is_fine_tuning(data):
        length, limit = data.seq_length, cfg.encoder_seq_length
        if length > limit:
            rule = f"exceeds the backbone's model.encoder_seq_length={limit}"
            faults.append(
                Fault(
                    "model.data.seq_length",
                    length,
                    rule,
                    f"use at most {limit}: set ++model.data.seq_length={limit}",
                )
            )
        tp = cfg.get("tensor_model_parallel_size", 1)
        if cfg.get("sequence_parallel", False) and length % tp:
            rule = f"sequence parallelism splits it over tensor_model_parallel_size={tp}"
            remedy = f"use a multiple of {tp}: set ++model.data.seq_length={length // tp * tp or tp}"
            faults.append(Fault("model.data.seq_length", length, rule, remedy))
    if faults:
        raise ConfigError(*faults)


def check_pretraining(cfg: DictConfig) -> None:
    """Checks what training exits with their backbone adds to `check_model`.

    Raises:
        ConfigError: listing every fault.
    """
    early_exit = read_early_exit(cfg)
    faults = _no_exit_faults(cfg, early_exit, "train")
    if early_exit.init == "ridge":
        rule = "the closed form needs a backbone that is trained already"
        faults.append(
            Fault(
                "model.early_exit.init",
                "ridge",
                rule,
                "set ++model.early_exit.init=random, or copy with model.restore_from_path",
            )
        )
    if early_exit.init == "copy" and not cfg.get("restore_from_path"):
        rule = "there are no trained weights to copy without model.restore_from_path"
        faults.append(
            Fault(
                "model.early_exit.init",
                "copy",
                rule,
                "set ++model.early_exit.init=random, or give a checkpoint",
            )
        )
    faults += key_faults(cfg, PRETRAINING)
    if (
        cfg.get("data") is not None
        and cfg.data.get("seq_length", cfg.encoder_seq_length) != cfg.encoder_seq_length
    ):
        length = cfg.data.seq_length
        rule = f"differs from model.encoder_seq_length={cfg.encoder_seq_length}, the length that Megatron trains with"
        remedy = (
            f"set ++model.encoder_seq_length={length} or ++model.data.seq_length={cfg.encoder_seq_length}"
        )
        faults.append(Fault("model.data.seq_length", length, rule, remedy))
    if cfg.get("data") is not None and not cfg.data.get("validation_drop_last", True):
        rule = "agreement with the final exit is counted over micro-batches of one size"
        faults.append(
            Fault(
                "model.data.validation_drop_last", False, rule, "set ++model.data.validation_drop_last=true"
            )
        )
    filling, stages = early_exit.training.bubble_filling, cfg.get("pipeline_model_parallel_size", 1)
    key = "model.early_exit.training.bubble_filling"
    if filling.enabled and not most_fills(stages, filling.backward_ratio):
        remedy = f"set ++{key}.warmup=false ++{key}.cooldown=false"
        rule = f"bubbles of pipeline_model_parallel_size={stages} have no room for a micro-batch"
        faults.append(Fault(key, "on", rule, remedy))
    if filling.enabled and cfg.get("rampup_batch_size"):
        rule = "bubble filling needs a constant number of micro-batches"
        remedy = f"set ++{RAMP_UP}=null, or ++{key}.warmup=false ++{key}.cooldown=false"
        faults.append(Fault(RAMP_UP, cfg.rampup_batch_size, rule, remedy))
    faults += document_faults(cfg)
    if faults:
        raise ConfigError(*faults)
