# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which ranks drop alike, and which do not."""

import pytest
import torch

from tests.distributed.test_pretraining_parallel import section
from tests.support.pretraining import Case, Recorder, pretraining_config
from tests.support.tiny_gpt import fill, tiny_model, tiny_model_config
from tests.support.tuning import Layout, tuning_trainer, write_text


def dropped_positions(parallel: bool) -> list[bool]:
    """Which positions the first head of this rank does not see, of values that are all one."""
    config = tiny_model_config(tp=2, attention_dropout=0.5, sequence_parallel=parallel)
    attention = tiny_model(config, 2).gpt.train().decoder.layers[0].self_attention.core_attention
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    query = torch.zeros(32, 1, 4, 32)
    value = torch.eye(32)[:, None, None].repeat(1, 1, 2, 1)
    torch.manual_seed(7)  # the default random numbers, the same on every rank
    with get_cuda_rng_tracker().fork() if parallel else torch.enable_grad():
        out = attention(query, torch.zeros(32, 1, 2, 32), value, None)
    return (out.view(32, 4, 32)[-1, 0] == 0).tolist()


@pytest.mark.parametrize("parallel", [False, True], ids=["TP", "SP"])
def test_heads_of_tensor_parallel_ranks_drop_other_positions(parallel, workers):
    first, second = workers(2).run(dropped_positions, parallel)
    assert any(first) and not all(first)
    assert first != second


def layers_dropped(prefixes: dict, layout: Layout) -> list[tuple[int, int]]:
    """Of every forward pass of a step on this stage: its sample's number, and the one that layers drop by."""
    filling = dict(warmup=True, cooldown=True)
    case = Case(section("norm, tied", [2, 4, 6], bubble_filling=filling, layer_dropout=dict(max_rate=0.5)))
    trainer = tuning_trainer(layout, 1, limit_val_batches=0)
    model = Recorder()(pretraining_config(prefixes, case, layout), trainer)
    fill(model)
    model.first_weights.complete, model.keep_gradients, seen = True, False, []

    def note(_module, _args) -> None:
        seen.append((model.filling.running.sample, model.gpt.layer_dropout.seed[2]))

    model.gpt.decoder.register_forward_pre_hook(lambda module, args: note(module, args))
    trainer.fit(model)
    return seen


def test_a_sample_skips_layers_by_its_own_number_on_every_stage(tmp_path, workers):
    found = workers(4).run(layers_dropped, write_text(tmp_path), Layout(pp=4))
    assert {len(stage) for stage in found} != {4}, "some passes are fills"
    for stage in found:
        assert stage and all(sample == drawn for sample, drawn in stage)
