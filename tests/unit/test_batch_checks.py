# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Batch sizes that grow and documents that share a sequence: what cannot work or changes nothing is refused."""

import pytest

from nemo_ee.models.checks import batch_checks
from nemo_ee.models.checks.model_checks import check_model, check_pretraining, check_tuning
from tests.unit.test_model_checks import PRETRAINING, config, faults_of

RAMP_UP = "model.rampup_batch_size"
NOT_GROWING = {
    "two numbers": ([2, 2], 1, "[start, increment, samples]", "or null"),
    "no samples": ([2, 2, 0], 1, "[start, increment, samples]", "or null"),
    "start": ([3, 1, 100], 1, "start 3 must be a multiple", "e.g. 2"),
    "increment": ([4, 3, 100], 1, "increment 3 must be a multiple", "e.g. 2"),
    "data parallelism": ([2, 4, 100], 2, "start 2 must be a multiple", "e.g. 4"),
    "past the end": ([2, 4, 100], 1, "lead from 2 to model.global_batch_size=8", "null"),
    "full from the start": ([8, 2, 100], 1, "lead from 8 to", "null"),
}


@pytest.mark.parametrize("case", NOT_GROWING)
def test_a_ramp_up_that_leads_nowhere_is_refused(case):
    ramp, world, rule, remedy = NOT_GROWING[case]
    faults = faults_of(check_model, config(rampup_batch_size=ramp), world)
    assert [fault.key for fault in faults] == [RAMP_UP] * len(faults)
    assert rule in faults[0].rule and remedy in faults[0].remedy


@pytest.mark.parametrize("ramp, world", [([2, 2, 100], 1), ([2, 6, 1], 1), ([4, 4, 100], 2), (None, 1)])
def test_a_sound_ramp_up(ramp, world):
    made = config(**PRETRAINING, rampup_batch_size=ramp)
    check_model(made, world)
    check_pretraining(made)


def test_filling_while_growing_names_both_ways_out():
    filled = dict(early_exit__training=dict(bubble_filling=dict(warmup=True)))
    changes = dict(PRETRAINING, pipeline_model_parallel_size=4, rampup_batch_size=[2, 2, 100], **filled)
    (fault,) = faults_of(check_pretraining, config(**changes))
    assert fault.key == RAMP_UP
    assert "null" in fault.remedy and "bubble_filling.warmup=false" in fault.remedy


def test_tuning_does_not_grow():
    (fault,) = faults_of(check_tuning, config(rampup_batch_size=[2, 2, 100]))
    assert fault.key == RAMP_UP and "null" in fault.remedy


APART = dict(get_attention_mask_from_fusion=False, data__reset_attention_mask=True)
SOUND_DOCUMENTS = {
    "apart": APART,
    "apart, rotary": dict(APART, position_embedding_type="rope", data__reset_position_ids=True),
    "positions alone, learned": dict(data__reset_position_ids=True),
    "together": dict(data__reset_attention_mask=False, position_embedding_type="rope"),
}
UNSOUND_DOCUMENTS = {
    "a mask that is not made": (dict(data__reset_attention_mask=True), "reset_attention_mask", "fusion"),
    "rotary positions": (
        dict(data__reset_position_ids=True, position_embedding_type="rope"),
        "reset_position_ids",
        "reset_attention_mask",
    ),
}


@pytest.mark.parametrize("check", [check_pretraining, check_tuning])
@pytest.mark.parametrize("case", SOUND_DOCUMENTS)
def test_sound_documents(case, check):
    check(config(**PRETRAINING, **SOUND_DOCUMENTS[case]))


@pytest.mark.parametrize("check", [check_pretraining, check_tuning])
@pytest.mark.parametrize("case", UNSOUND_DOCUMENTS)
def test_settings_without_effect_are_refused(case, check):
    changes, key, remedy = UNSOUND_DOCUMENTS[case]
    (fault,) = faults_of(check, config(**PRETRAINING, **changes))
    assert fault.key == f"model.data.{key}" and remedy in fault.remedy


def test_pretraining_reads_no_fine_tuning_data():
    (fault,) = faults_of(check_pretraining, config(**PRETRAINING, data__train_ds=dict(file_names=["a"])))
    assert fault.key == "model.data.train_ds" and "data_prefix" in fault.remedy


def test_attention_that_reads_no_mask_is_refused(monkeypatch):
    monkeypatch.setattr("nemo_ee.modeling.specs.have_transformer_engine", lambda: True)
    faults = list(batch_checks.document_faults(config(**APART, transformer_engine=True)))
    assert [fault.key for fault in faults] == ["model.data.reset_attention_mask"]
    assert "++model.transformer_engine=false" in faults[0].remedy
