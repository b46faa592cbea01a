# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""One exit as a model of its own: a Llama of the layers below it, which drafts for the base in other engines."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemo_ee.checkpoint.stored_tensors import StoredTensor
from nemo_ee.errors import ConfigError, Fault
from nemo_ee.export.card import draft_card
from nemo_ee.export.fold import filled, folded_mlp, made, still_attention, widened
from nemo_ee.export.folder import dtype_of, write_model
from nemo_ee.export.llama_weights import LlamaWeights, Weights
from nemo_ee.export.measured import read_measured
from nemo_ee.export.plain_llama import architecture_of, hugging_face_config
from nemo_ee.export.settings import ENGINES, ExportConfig
from nemo_ee.export.source import TUNE_FIRST, Source
from nemo_ee.head_config import HeadConfig

FOLDED = "llama"
"""Architecture of a draft with a translator: of the three the one whose MLPs may have biases."""


@dataclass(frozen=True)
class Draft:
    """A draft model before it is written.

    Attributes:
        layer: of the exit.
        head: the exit's modules.
        weights: by Hugging Face's names.
        layers: transformer layers, those of the head included.
        units: width of every MLP.
        tied: whether it has the embedding as output layer.
    """

    layer: int
    head: HeadConfig
    weights: Weights
    layers: int
    units: int
    tied: bool

    @property
    def folded(self) -> bool:
        """Whether a translator became units of an MLP with biases."""
        return self.head.linear

    @property
    def scaled(self) -> bool:
        """Whether logits are the exit's but for one positive factor per token."""
        return self.head.linear or not self.head.norm


def export_draft(config: ExportConfig, source: Source, folder: Path) -> None:
    """Writes an exit into a folder as a draft model.

    Args:
        config: the settings.
        source: what is exported.
        folder: empty.

    Raises:
        ConfigError: no such exit; a head that no plain model computes, or that one of the engines would compute
            wrongly.
        CheckpointError: tensors that are missing, or that have no place in a plain model; weights that are no numbers;
            a shortlist that names no tokens of the base.
    """
    layer = _layer(config, source)
    head = source.early_exit.heads[layer]
    architecture = architecture_of(source.model, config.architecture)
    if head.linear:
        architecture = FOLDED
    others = [f"exits.{n}." for n in source.early_exit.layers if n != layer]
    read = {key: t for key, t in source.tensors.items() if not key.startswith(tuple(others))}
    dtype = dtype_of(read, config.precision)
    _check_head(config, head, layer, dtype)
    report = read_measured(config, source)
    draft = build_draft(source, layer)
    settings = hugging_face_config(
        source.model, architecture, source.rows, dtype, **source.tokenizer.special_tokens()
    )
    settings.num_hidden_layers, settings.intermediate_size = draft.layers, draft.units
    settings.tie_word_embeddings = draft.tied
    if draft.folded:
        settings.mlp_bias, settings.attention_bias = True, bool(source.model.get("qkv_bias"))
    write_model(folder, settings, draft.weights, source.tokenizer, config.max_shard_size)
    (folder / "README.md").write_text(draft_card(config, source, settings, draft, report), encoding="utf-8")


def build_draft(source: Source, layer: int) -> Draft:
    """The draft model of an exit; its tensors are read when they are asked for.

    Args:
        source: an open checkpoint with exits.
        layer: of the exit, whose head `_check_head` let pass.
    """
    head, parts, prefix = source.early_exit.heads[layer], source.weights(), f"exits.{layer}."
    plain = parts.plain()  # what is not is refused
    weights, layers, units = parts.trunk(layer), layer, parts.ffn
    if head.block:
        weights |= parts.layer(f"{prefix}block.", layers)
        layers += 1
    if head.mlp == "residual":
        weights |= still_attention(layers, weights) | parts.mlp(f"{prefix}mlp.mlp.", layers)
        weights[f"model.layers.{layers}.post_attention_layernorm.weight"] = parts.take(
            f"{prefix}mlp.norm.weight", parts.hidden
        )
        layers += 1
    final = plain["model.norm.weight"]
    weights["model.norm.weight"] = _typical_size(final)
    if head.linear:
        weights |= still_attention(layers, weights) | _fold(parts, prefix, head, layers)
        units = max(units, weights[f"model.layers.{layers}.mlp.up_proj.weight"].shape[0])
        layers += 1
        weights = widened(weights, units)
        if source.model.get("qkv_bias"):  # Llama's attention has all of its biases, or none
            zeros = filled(final, 0.0, parts.hidden)
            weights |= {f"model.layers.{n}.self_attn.o_proj.bias": zeros for n in range(layers)}
    elif head.norm:
        weights["model.norm.weight"] = parts.take(f"{prefix}norm.weight", parts.hidden)
    output = _output_rows(source, parts, plain, layer)
    tied = parts.tied and output is plain["model.embed_tokens.weight"]
    if not tied:
        weights["lm_head.weight"] = output
    return Draft(layer, head, weights, layers, units, tied)


def _fold(parts: LlamaWeights, prefix: str, head: HeadConfig, number: int) -> Weights:
    hidden = parts.hidden
    linear = {
        "weight": parts.take(f"{prefix}linear.weight", hidden, hidden),
        "bias": parts.take(f"{prefix}linear.bias", hidden),
    }
    mlp = None
    if head.mlp == "beside":
        named = parts.mlp(f"{prefix}mlp.mlp.", number)
        mlp = {name.split(".")[-2].removesuffix("_proj"): tensor for name, tensor in named.items()}
        mlp["norm"] = parts.take(f"{prefix}mlp.norm.weight", hidden)
    return folded_mlp(number, linear, parts.take(f"{prefix}norm.weight", hidden), mlp)


def _typical_size(final: StoredTensor) -> StoredTensor:
    """Gain of a draft's last norm where that stands for no norm of the exit: the size of the base's own last states."""

    def constant() -> Tensor:
        gain = final.read().float()
        return torch.full_like(gain, gain.square().mean().sqrt())

    return made(final.shape, final.dtype, constant)


def _output_rows(source: Source, parts: LlamaWeights, plain: Weights, layer: int) -> StoredTensor:
    """Rows [V, H] of the output layer: the exit's own, of a shortlist over the base's, and these alone if equal."""
    base = plain.get("lm_head.weight", plain["model.embed_tokens.weight"])
    head = source.early_exit.heads[layer]
    if head.projection == "tied":
        return base
    name = f"exits.{layer}.projection."
    if head.projection == "untied":
        return parts.rows_of(f"{name}weight")
    ids = parts.token_ids(f"{name}token_ids", head.shortlist_size, base.shape[0], source.exits_name)
    rows = parts.rows_of(f"{name}weight", head.shortlist_size)
    dtype = torch.promote_types(base.dtype, rows.dtype)

    def over() -> Tensor:
        whole = base.read().to(dtype, copy=True)
        whole[ids.read()] = rows.read().to(dtype)
        return whole

    frozen = torch.equal(
        over(), base.read().to(dtype)
    )  # copied and not tuned: no weights of its own are needed
    return base if frozen else made(base.shape, dtype, over)


def _layer(config: ExportConfig, source: Source) -> int:
    layers = source.early_exit.layers
    if config.layer is None and len(layers) == 1:
        return layers[0]
    if config.layer not in layers:
        rule = f"must be one of the exits of {source.exits_name}, which are at {list(layers)}"
        remedy = f"set layer={layers[0]}" if layers else TUNE_FIRST.format(config.gpt_model_file)
        raise ConfigError(Fault("layer", config.layer, rule, remedy))
    return config.layer


def _check_head(config: ExportConfig, head: HeadConfig, layer: int, dtype: torch.dtype) -> None:
    """Refuses heads that no plain model computes, and what engines would compute wrongly."""
    faults, name = [], f"early_exit.head of layer {layer}"
    if head.linear and not head.norm:
        rule = "a translator without a norm before it is no Llama's layer"
        faults.append(
            Fault(name, "linear without norm", rule, "export another exit, or tune one with head.norm=true")
        )
    if head.linear and dtype is torch.float16:
        rule = "a translator becomes weights of up to 2^20, which float16 has not"
        faults.append(Fault("precision", config.precision, rule, "set precision=bf16 or precision=32"))
    if head.linear and config.architecture not in (None, FOLDED):
        rule = f"a translator becomes an MLP with biases, which of the three {FOLDED} alone may have"
        faults.append(Fault("architecture", config.architecture, rule, "leave it out"))
    if head.linear and "sglang" in config.engines:
        rule = "SGLang drops the biases of MLPs without a word, and a translator becomes such"
        others = [engine for engine in config.engines if engine != "sglang"] or ENGINES[:-1]
        remedy = (
            f"set engines=[{','.join(others)}], or tune exits with head.linear=false and head.mlp=residual"
        )
        faults.append(Fault("engines", list(config.engines), rule, remedy))
    if faults:
        raise ConfigError(*faults)
