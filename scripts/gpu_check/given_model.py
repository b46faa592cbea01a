# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The measurements of `speed`, on a model that was given: a `.nemo`, or a `.gguf` file that is converted first."""

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import random_model
import tiny
import torch
from omegaconf import OmegaConf
from part import NO_GPU
from result import Result
from speed import QUICK, Effort, measure

from nemo_ee.checkpoint import archive, run_keys
from nemo_ee.errors import CheckpointError
from nemo_ee.models.megatron_gpt_early_exit_model import MegatronGPTEarlyExitModel as Model
from nemo_ee.running.restore import restore_model

if TYPE_CHECKING:
    from part import Settings

ROOT = Path(__file__).resolve().parents[2]
FULL = Effort(128, 32, 10.0, 3, 9)
THRESHOLD = 0.5
SHORTLIST = 8192


def check(settings: "Settings", result: Result) -> None:
    """See the module's text. Prompts are pieces of the licence, a text that is at hand."""
    assert settings.model is not None, "this part runs with --model only"
    effort = QUICK if settings.quick else FULL
    base = settings.model if settings.model.suffix == ".nemo" else converted(settings.model, settings.work)
    model, name = restore(base, settings.adapter), settings.model.stem
    ids = model.tokenizer.text_to_ids((ROOT / "LICENSE").read_text())
    prompts = [ids[k : k + effort.prompt] for k in range(0, len(ids) - effort.prompt, effort.prompt // 2)]
    prompts = (prompts * (16 * effort.most))[: 16 * effort.most]
    measure(model, name, prompts, dict.fromkeys(model.early_exit.layers, THRESHOLD), effort, result)


def converted(source: Path, work: Path) -> Path:
    """A GGUF file as a `.nemo`; another process without a GPU converts."""
    target = work / "given.nemo"
    command = [sys.executable, str(ROOT / "scripts" / "convert_llama_hf_to_nemo.py")]
    command += [f"input_name_or_path='{source}'", f"output_path='{target}'", "precision=bf16"]
    subprocess.run(command, env={**os.environ, **NO_GPU}, check=True, cwd=work)
    return target


def restore(base: Path, adapter: Path | None) -> Any:
    """The model in bfloat16 with the adapter's exits, its own, or untuned ones a third and two thirds up."""
    trainer = tiny.trainer("bf16")
    changes = {"precision": "bf16", "megatron_amp_O2": True}
    config = archive.read_config(base)
    if adapter is not None or config.get("early_exit") is not None:
        return restore_model(str(base), adapter and str(adapter), trainer, changes)
    config, layers = OmegaConf.merge(run_keys.without_layout(config), changes), config.num_layers
    if layers < 3:
        raise CheckpointError(f"--model {base.name}: has {layers} layers and no exits; give --adapter")
    exits = {
        "layers": [layers // 3, 2 * layers // 3],
        "init": "random",
        "head": {"shortlist_size": SHORTLIST},
    }
    config = Model.add_exits(config, exits)
    model = Model.restore_from(str(base), override_config_path=config, trainer=trainer).eval()
    with torch.no_grad():
        for head in model.gpt.exits.values():
            rows = model.gpt.output_weight()[: head.projection.num_kept]
            random_model.copy_final_exit(head, model.gpt.decoder.final_layernorm.weight, rows)
    return model
