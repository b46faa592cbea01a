# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Fused operations stay on where the machine has what they need, and are turned off elsewhere."""

import re
from pathlib import Path

import megatron.core
import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig
from omegaconf import OmegaConf

from nemo_ee.modeling.fusions import FUSIONS
from nemo_ee.models.checks.model_checks import adapt_to_machine

ALL_FUSIONS = dict.fromkeys([*FUSIONS, "transformer_engine"], True)
FUSED_BY_A_COMPILER = {"bias_activation_fusion", "bias_dropout_add_fusion"}
OF_TRANSFORMER_ENGINE = {"transformer_engine", "apply_rope_fusion", "fp8"}
MACHINES = {
    "a CPU": (False, False, False, set()),
    "a CPU beside Apex and Transformer Engine": (False, True, True, set()),
    "a GPU": (True, False, False, FUSED_BY_A_COMPILER),
    "a GPU and Apex": (True, True, False, FUSED_BY_A_COMPILER | {"gradient_accumulation_fusion"}),
    "a GPU and Transformer Engine": (True, False, True, FUSED_BY_A_COMPILER | OF_TRANSFORMER_ENGINE),
}


@pytest.fixture
def machine(monkeypatch):
    """``machine(gpu, apex, te)``: as if megatron-core had found these."""

    def have(gpu: bool, apex: bool, te: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(layers, "_grad_accum_fusion_available", apex)
        monkeypatch.setattr(gpt_layer_specs, "HAVE_TE", te)
        monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", object() if te else None)

    return have


@pytest.mark.parametrize("case", MACHINES)
def test_only_what_the_machine_has_stays_on(case, machine):
    *found, kept = MACHINES[case]
    machine(*found)
    made = OmegaConf.create(dict(**ALL_FUSIONS, use_cpu_initialization=found[0]))
    off = [text.removeprefix("model.").partition(" ")[0] for text in adapt_to_machine(made)]
    assert {key for key in ALL_FUSIONS if made[key]} == kept
    assert set(off) == ALL_FUSIONS.keys() - kept | ({"use_cpu_initialization"} if found[0] else set())
    assert made.use_cpu_initialization is not found[0]
    assert adapt_to_machine(made) == []


def test_fp8_is_transformer_engines_modules_alone(machine):
    machine(gpu=True, apex=False, te=True)
    made = OmegaConf.create(dict(fp8=True, apply_rope_fusion=True, transformer_engine=False))
    assert len(adapt_to_machine(made)) == 1 and not made.fp8 and made.apply_rope_fusion


@pytest.mark.skipif(gpt_layer_specs.HAVE_TE, reason="Transformer Engine is installed")
def test_megatron_refuses_what_is_turned_off():
    sizes = dict(num_layers=1, hidden_size=8, num_attention_heads=1, perform_initialization=False)
    with pytest.raises(ValueError, match="apply_rope_fusion is not available"):
        TransformerConfig(**sizes, apply_rope_fusion=True)
    fused = TransformerConfig(**sizes, gradient_accumulation_fusion=True)
    with pytest.raises(RuntimeError, match="fused_weight_gradient_mlp_cuda"):
        layers.ColumnParallelLinear(8, 8, config=fused, init_method=torch.nn.init.zeros_)


@pytest.mark.parametrize(
    ("key", "reader"),
    [
        ("persist_layer_norm", "fusions/fused_layer_norm.py"),
        ("masked_softmax_fusion", "transformer/dot_product_attention.py"),
    ],
)
def test_fusions_that_no_layer_here_has_are_read_nowhere_else(key, reader):
    root = Path(megatron.core.__path__[0])
    read = rf"config\.{key}"
    files = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if re.search(read, path.read_text()) and not re.search(f"assert not {read}", path.read_text())
    }
    assert files == {reader}
