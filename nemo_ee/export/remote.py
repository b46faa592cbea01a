# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The model with all its exits, and the code that runs them in transformers: `remote_code/`, which nothing here
imports, and the rule by which tokens leave."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from nemo_ee.checkpoint.stored_tensors import StoredTensor
from nemo_ee.config import EarlyExitConfig
from nemo_ee.decoding import leaving
from nemo_ee.errors import CheckpointError, ConfigError, Fault
from nemo_ee.export.folder import dtype_of, write_json, write_model
from nemo_ee.export.llama_weights import LlamaWeights, Weights
from nemo_ee.export.measured import read_measured
from nemo_ee.export.plain_llama import architecture_of, hugging_face_config
from nemo_ee.export.remote_card import remote_card
from nemo_ee.export.settings import ExportConfig
from nemo_ee.export.source import TUNE_FIRST, Source
from nemo_ee.head_config import HeadConfig

CODE = Path(__file__).parent / "remote_code"
MODULE = "modeling_early_exit"


def export_remote(config: ExportConfig, source: Source, folder: Path) -> None:
    """Writes the base, its exits and their code into a folder.

    Args:
        config: the settings.
        source: what is exported.
        folder: empty.

    Raises:
        CheckpointError: tensors that are missing, surplus or of other shapes; weights that are no numbers.
        ConfigError: the architecture does not fit, or there are no exits.
    """
    early_exit = source.early_exit
    if not early_exit.layers:
        rule = f"kind=remote runs exits, and {source.name} has none"
        remedy = f"set kind=base, or {TUNE_FIRST.format(config.gpt_model_file)}"
        raise ConfigError(Fault("adapter_file", config.adapter_file, rule, remedy))
    architecture = architecture_of(source.model, config.architecture)
    report = read_measured(config, source)
    weights = source.weights()
    base = weights.plain()
    exits = exit_weights(weights, early_exit, source)
    settings = hugging_face_config(
        source.model,
        architecture,
        source.rows,
        dtype_of(base | exits, config.precision),
        **source.tokenizer.special_tokens(),
    )
    write_model(folder, settings, base | exits, source.tokenizer, config.max_shard_size)
    _name_classes(folder / "config.json", described(early_exit))
    shutil.copy(leaving.__file__, folder)
    shutil.copytree(CODE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "README.md").write_text(remote_card(config, source, settings, MODULE, report), encoding="utf-8")


def _name_classes(path: Path, early_exit: dict[str, Any]) -> None:
    """Has a `config.json` name the classes of the folder's code. A model type of its own: were it the family's,
    transformers would take these classes for all later models of the family in the same process."""
    config = json.loads(path.read_text(encoding="utf-8"))
    family = config["architectures"][0].removesuffix("ForCausalLM")
    config |= {
        "early_exit": early_exit,
        "model_type": f"{family.lower()}_early_exit",
        "architectures": [f"{family}EarlyExitForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODULE}.{family}EarlyExitConfig",
            "AutoModelForCausalLM": f"{MODULE}.{family}EarlyExitForCausalLM",
        },
    }
    write_json(path, config)


def described(early_exit: EarlyExitConfig) -> dict[str, Any]:
    """`config.early_exit`, which the code of the folder reads."""
    inference = early_exit.inference
    threshold = inference.known_threshold
    return {
        "layers": list(early_exit.layers),
        "head": [dataclasses.asdict(head) for head in early_exit.heads.values()],
        "inference": {
            "threshold": list(threshold) if isinstance(threshold, tuple) else threshold,
            "exits": None if inference.exits is None else list(inference.exits),
            "confidence": inference.confidence,
        },
    }


def exit_weights(weights: LlamaWeights, early_exit: EarlyExitConfig, source: Source) -> Weights:
    """All exits' tensors under the names that `ExitHead` in the folder's code has for them.

    Raises:
        CheckpointError: a tensor is missing, surplus or of another shape; a shortlist names no tokens of the base.
    """
    found = {
        f"exits.{n}.{name}": tensor
        for n, head in early_exit.heads.items()
        for name, tensor in _head_weights(weights, n, head, source).items()
    }
    if left := weights.unused():
        raise CheckpointError(
            f"{source.exits_name}: {', '.join(left[:3])}: {len(left)} tensors belong to no exit of its configuration; "
            "use exits as save_exits wrote them"
        )
    return found


def _head_weights(weights: LlamaWeights, n: int, head: HeadConfig, source: Source) -> Weights:
    mine, hidden, found = f"exits.{n}.", weights.hidden, {}
    if head.block:
        found |= _renamed(weights.layer(f"{mine}block.", 0), "model.layers.0.", "block.")
    if head.mlp != "none":
        found["mlp_norm.weight"] = weights.take(f"{mine}mlp.norm.weight", hidden)
        found |= _renamed(weights.mlp(f"{mine}mlp.mlp.", 0), "model.layers.0.", "")
    if head.norm:
        found["norm.weight"] = weights.take(f"{mine}norm.weight", hidden)
    if head.linear:
        found["linear.weight"] = weights.take(f"{mine}linear.weight", hidden, hidden)
        found["linear.bias"] = weights.take(f"{mine}linear.bias", hidden)
    if head.projection == "untied":
        found["projection.weight"] = weights.rows_of(f"{mine}projection.weight")
    if head.projection == "shortlist":
        found |= _shortlist(weights, f"{mine}projection.", head.shortlist_size, source)
    return found


def _shortlist(weights: LlamaWeights, mine: str, size: int, source: Source) -> Weights:
    ids = weights.token_ids(f"{mine}token_ids", size, source.rows, source.exits_name)
    bucket = weights.take(f"{mine}bucket_weight", weights.hidden)
    one_row = StoredTensor((1, weights.hidden), bucket.dtype, lambda: bucket.read()[None])
    return {
        "projection.rows.weight": weights.rows_of(f"{mine}weight", size),
        "projection.bucket.weight": one_row,
        "projection.bucket.bias": weights.take(f"{mine}bucket_bias", 1),
        "projection.token_ids": ids,
    }


def _renamed(weights: Weights, old: str, new: str) -> Weights:
    return {new + name.removeprefix(old): tensor for name, tensor in weights.items()}
