# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""NeMo's own ways to load a checkpoint, without a word of this package; as a script, in a process of its own.

On a machine without Transformer Engine NeMo's `get_specs` fails, so `use_local_layers` gives NeMo Megatron's own
layers. That and the stand-ins are the CPU's necessities; nothing here knows how a tokenizer gets into a file.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import torch


def use_local_layers() -> None:
    """Lets NeMo build its models from megatron-core's own layers, in groups that this megatron-core wants first."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from nemo.collections.nlp.models.language_modeling import megatron_gpt_model

    def get_specs(name: str, config: Any, *rest: Any) -> Any:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
            )
        if not parallel_state.is_initialized():
            parallel_state.initialize_model_parallel()
        return get_gpt_layer_local_spec(normalization=config.normalization)

    megatron_gpt_model.get_specs = get_specs


def trainer() -> Any:
    from lightning.pytorch import Trainer
    from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy

    strategy = NLPDDPStrategy(no_ddp_communication_hook=True, process_group_backend="gloo")
    return Trainer(
        accelerator="cpu", devices=1, strategy=strategy, precision="32-true", logger=False, max_steps=1
    )


def restore(path: str, cls: type | None = None, **overrides: Any) -> Any:
    """`MegatronGPTModel.restore_from`, or another class's, with NeMo's stock connector."""
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo.collections.nlp.parts.nlp_overrides import NLPSaveRestoreConnector
    from omegaconf import open_dict

    cls, connector, config = cls or MegatronGPTModel, NLPSaveRestoreConnector(), None
    if Path(path).is_dir():
        connector.model_extracted_dir = path
    if overrides:
        config = cls.restore_from(path, return_config=True, save_restore_connector=connector)
        with open_dict(config):
            config.update(overrides)
    return cls.restore_from(
        path, override_config_path=config, trainer=trainer(), save_restore_connector=connector
    )


def as_lm_eval(path: str) -> Any:
    """The recipe by which lm-evaluation-harness's `nemo_lm` loads a model (lm_eval/models/nemo_lm.py)."""
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo.collections.nlp.parts.nlp_overrides import NLPSaveRestoreConnector
    from omegaconf import OmegaConf, open_dict

    run, connector = trainer(), NLPSaveRestoreConnector()
    if Path(path).is_dir():
        connector.model_extracted_dir = path
    config = connector.restore_from(None, path, return_config=True, trainer=run)
    if not hasattr(config, "target"):
        config["target"] = f"{MegatronGPTModel.__module__}.{MegatronGPTModel.__name__}"
    OmegaConf.set_struct(config, True)
    with open_dict(config):
        for key, value in dict(
            sequence_parallel=False,
            activations_checkpoint_granularity=None,
            activations_checkpoint_method=None,
            precision=run.precision,
            global_batch_size=None,
            tensor_model_parallel_size=1,
            pipeline_model_parallel_size=1,
            apply_rope_fusion=False,
        ).items():
            if hasattr(config, key):
                config[key] = value
    module, name = config.target.rsplit(".", 1)
    cls = getattr(importlib.import_module(module), name)
    build = cls._build_tokenizer  # which the recipe wraps in a lock between processes
    cls._build_tokenizer = lambda self: build(self)
    try:
        return cls.restore_from(
            restore_path=path,
            trainer=run,
            override_config_path=config,
            save_restore_connector=connector,
            map_location="cpu",
        )
    finally:
        cls._build_tokenizer = build


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[B, S, padded V] of a NeMo GPT model's module, by Megatron's forward pass."""
    model.eval()
    length = ids.shape[1]
    mask = torch.ones(1, 1, length, length).triu(1).bool()
    return model.model(ids, torch.arange(length).expand_as(ids), mask)


if __name__ == "__main__":
    from nemo_ee.runtime import stand_ins

    stand_ins.enable()
    for known in [name for name in sys.modules if name.startswith("nemo_ee.")]:
        assert known.startswith("nemo_ee.runtime") and "archived" not in known, known
    use_local_layers()
    way, path, inputs, output = sys.argv[1:]
    loaded = {"restore": restore, "lm-eval": as_lm_eval}[way](path)
    found = {
        "class": f"{type(loaded).__module__}.{type(loaded).__name__}",
        "text": loaded.tokenizer.text_to_ids("the cat sat"),
        "logits": logits(loaded, torch.load(inputs)),
    }
    torch.save(found, output)
