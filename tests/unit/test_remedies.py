# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What an error tells to write works when it is pasted behind the command, in both training scripts."""

import shlex
from typing import Any

import pytest

from nemo_ee.models.checks.key_names import RULES
from tests.unit.test_key_rules import faults

FULL_BUBBLES = [
    "++model.early_exit.training.bubble_filling.warmup=true",
    "++model.early_exit.training.bubble_filling.cooldown=true",
]
BOTH = {
    "no batch": ["model.micro_batch_size=0"],
    "no global batch": ["model.global_batch_size=0"],
    "batches that do not divide": ["model.micro_batch_size=4", "model.global_batch_size=6"],
    "no layers on a stage": ["model.num_layers_in_last_pipeline_stage=0"],
    "heads": ["++model.num_attention_heads=7", "++model.num_query_groups=null"],
    "a mask that none reads": ["model.data.reset_attention_mask=true"],
    "positions that none reads": [
        "model.data.reset_position_ids=true",
        "++model.position_embedding_type=rope",
    ],
    "a fusion": ["++model.mcore_customization_config.masked_softmax_fusion=true"],
    "a window": ["++model.window_size=[3,0]"],
    "a key of Gemma 2": ["++model.mcore_customization_config.attn_logit_softcapping=50.0"],
}
OF = {
    "tuning": {
        "no module": [
            f"model.early_exit.head.{module}=false" for module in ("block", "mlp", "norm", "linear")
        ]
        + ["model.early_exit.head.projection=tied", "model.early_exit.init=random"],
        "long text": ["model.data.seq_length=4096"],
        "uneven text": [
            "model.data.seq_length=129",
            "model.tensor_model_parallel_size=2",
            "model.sequence_parallel=true",
        ],
    },
    "pretraining": {
        "uneven sequences": [
            "model.encoder_seq_length=129",
            "model.tensor_model_parallel_size=2",
            "model.sequence_parallel=true",
        ],
        "closed form": ["model.early_exit.init=ridge", "model.early_exit.head.linear=true"],
        "copies of nothing": ["model.early_exit.init=copy"],
        "other lengths": ["model.data.seq_length=64"],
        "parts of batches": ["model.data.validation_drop_last=false"],
        "no bubbles": FULL_BUBBLES,
        "a ramp of two numbers": ["model.rampup_batch_size=[2,2]"],
        "a ramp between micro-batches": ["model.micro_batch_size=4", "model.rampup_batch_size=[6,4,100]"],
        "a ramp that leads elsewhere": ["model.micro_batch_size=2", "model.rampup_batch_size=[2,4,100]"],
        "a ramp with fills": [
            *FULL_BUBBLES,
            "model.pipeline_model_parallel_size=4",
            "model.global_batch_size=64",
            "model.rampup_batch_size=[4,4,100]",
        ],
    },
}
CASES = [(script, name, words) for script in RULES for name, words in {**BOTH, **OF[script]}.items()]


def alternatives(remedy: str) -> list[list[str]]:
    """What a remedy gives to paste: one list of overrides per `or`."""
    parts = [shlex.split(part) for part in remedy.split(" or ")]
    words = [[word.rstrip(",;") for word in part if word.startswith("++")] for part in parts]
    return [part for part in words if part]


@pytest.mark.parametrize(("script", "name", "words"), CASES, ids=[f"{s}: {n}" for s, n, _ in CASES])
def test_remedies_work_when_pasted(script, name, words):
    found: dict[str, Any] = faults(script, words)
    assert found, name
    for key, fault in found.items():
        given = alternatives(fault.remedy)
        assert given, fault
        for pasted in given:
            assert key not in faults(script, [*words, *pasted]), (str(fault), pasted)
