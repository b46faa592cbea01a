# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""NeMo's own MegatronGPTModel trains, clips, saves, restores and generates without CUDA and Apex."""

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

STEPS = 3

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
O2 = {"megatron_amp_O2": True}
DISTRIBUTED_OPTIMIZER = {
    "optim__name": "mcore_distributed_optim",
    "optim__overlap_grad_sync": False,
    "optim__overlap_param_sync": False,
}
FULL_RECOMPUTE = {
    "activations_checkpoint_granularity": "full",
    "activations_checkpoint_method": "uniform",
    "activations_checkpoint_num_layers": 1,
    "hidden_dropout": 0.1,  # so that the recomputation must restore the random state
}


class Recorder(Callback):
    """What NeMo logs after each step: training loss in nats per token, gradient norm before clipping."""

    def __init__(self):
        self.losses = []
        self.norms = []

    def on_train_batch_end(self, trainer, model, *args):
        self.losses.append(trainer.callback_metrics["reduced_train_loss"].item())
        if "grad_norm" in trainer.callback_metrics:  # not with the distributed optimizer
            self.norms.append(trainer.callback_metrics["grad_norm"].item())


def build(precision=32, **overrides):
    from tests.support.tiny_nemo import LocalSpecGPT, tiny_config, tiny_trainer

    recorder = Recorder()
    o2 = "megatron_amp_O2" in overrides and "optim__name" not in overrides
    trainer = tiny_trainer(torch.distributed.get_world_size(), precision, STEPS, o2, callbacks=[recorder])
    return LocalSpecGPT(tiny_config(precision=precision, **overrides), trainer), trainer, recorder


def train(precision=32, **overrides):
    """Trains a tiny GPT; returns losses, gradient norms, validation loss, whether all weights moved."""
    model, trainer, recorder = build(precision, **overrides)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer.fit(model)
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    return recorder.losses, recorder.norms, trainer.callback_metrics["val_loss"].item(), all(moved)


def train_save_restore_generate(**overrides):
    """Trains, saves, restores, generates with both; returns both texts and whether all weights are equal."""
    from nemo.collections.nlp.modules.common.text_generation_strategy import GPTModelTextGenerationStrategy

    from tests.support.tiny_nemo import LocalSpecGPT, tiny_trainer

    def generate(model):
        model.eval()
        return model.generate(
            ["w1 w2 w3", "w7 w8 w9 w10 w11"],
            length_params={"max_length": 5, "min_length": 0},
            sampling_params={
                "use_greedy": True,
                "temperature": 1.0,
                "top_k": 0,
                "top_p": 1.0,
                "repetition_penalty": 1.0,
                "add_BOS": False,
                "all_probs": False,
                "compute_logprob": False,
                "end_strings": ["<eos>"],
            },
            strategy=GPTModelTextGenerationStrategy(model),
        )

    model, trainer, _ = build(**overrides)
    trainer.fit(model)
    model.save_to("tiny.nemo")
    torch.distributed.barrier()
    assert Path("tiny.nemo").stat().st_size > 0
    restored = LocalSpecGPT.restore_from(
        "tiny.nemo", trainer=tiny_trainer(torch.distributed.get_world_size())
    )
    same = [torch.equal(old, new) for old, new in zip(model.parameters(), restored.parameters(), strict=True)]
    first, second = generate(model), generate(restored)
    return first and first["sentences"], second and second["sentences"], all(same)


def clip(max_norm):
    """Clips one sharded and one replicated parameter at TP2; returns the norm and the clipped gradients."""
    from nemo.collections.nlp.modules.common.megatron.clip_grads import clip_grad_norm_fp32

    from tests.support.distributed import initialize_model_parallel

    initialize_model_parallel(tp=2)
    sharded, replicated = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
    sharded.tensor_model_parallel = True
    sharded.grad = torch.full((2,), 2.0 + torch.distributed.get_rank())
    replicated.grad = torch.full((1,), 3.0)
    norm = clip_grad_norm_fp32([sharded, replicated], max_norm)
    return norm.item(), sharded.grad.tolist(), replicated.grad.tolist()


@pytest.mark.parametrize("overrides", [TP2, {}], ids=["tp2", "dp2"])
@pytest.mark.parametrize(
    "precision, common, tolerance",
    [(32, {}, 1e-4), ("bf16", O2, 2e-2)],  # sums in another order, rounded to 24 and to 8 bits
    ids=["fp32", "bf16_o2"],
)
def test_two_processes_equal_one(workers, precision, common, tolerance, overrides):
    """Same data, and the same initial weights by use_cpu_initialization."""
    [[losses, norms, validation, moved]] = workers(1).run(train, precision, **common)
    assert moved and len(losses) == len(norms) == STEPS
    for result in workers(2).run(train, precision, **common, **overrides):
        assert result[0] == pytest.approx(losses, rel=tolerance)
        assert result[1] == pytest.approx(norms, rel=10 * tolerance)
        assert result[2] == pytest.approx(validation, rel=tolerance)
        assert result[3]


@pytest.mark.parametrize(
    "precision, overrides",
    [
        (32, PP2),
        (32, {**PP2, **FULL_RECOMPUTE}),
        ("bf16-mixed", TP2),  # autocast
        ("bf16", {**PP2, **O2}),
        ("bf16", {**O2, **DISTRIBUTED_OPTIMIZER}),
        ("bf16", {**TP2, **O2, **DISTRIBUTED_OPTIMIZER}),
    ],
    ids=[
        "pp2",
        "pp2_recompute",
        "tp2_autocast",
        "pp2_o2",
        "dp2_distributed_optimizer",
        "tp2_distributed_optimizer",
    ],
)
def test_two_processes_train(workers, precision, overrides):
    """Both ranks agree on every number, which starts near that of a uniform guess; every weight moves."""
    first, second = workers(2).run(train, precision, **overrides)
    assert first == second
    losses, norms, validation, moved = first
    assert losses[0] == pytest.approx(math.log(4608), rel=0.02)
    assert len(losses) == STEPS and all(map(math.isfinite, [*losses, *norms, validation]))
    assert moved
    if "optim__name" not in overrides:
        assert len(norms) == STEPS and min(norms) > 0


@pytest.mark.parametrize("overrides", [{}, TP2, PP2], ids=["one_process", "tp2", "pp2"])
def test_saves_restores_and_generates(workers, overrides):
    for trained, restored, same_weights in workers(2 if overrides else 1).run(
        train_save_restore_generate, **overrides
    ):
        assert same_weights
        assert trained == restored
        assert len(trained) == 2 and trained[0].startswith("w1 w2 w3") and len(trained[0].split()) > 3


def test_clipping_counts_replicated_gradients_once(workers):
    """Squares: 2 * 2^2 on rank 0, 2 * 3^2 on rank 1, 3^2 once for both."""
    norm = math.sqrt(2 * 4 + 2 * 9 + 9)
    scale = 1.0 / norm
    for rank, (measured, sharded, replicated) in enumerate(workers(2).run(clip, 1.0)):
        assert measured == pytest.approx(norm, rel=1e-5)
        assert sharded == pytest.approx([(2.0 + rank) * scale] * 2, rel=1e-5)
        assert replicated == pytest.approx([3.0 * scale], rel=1e-5)
    assert workers(2).run(clip, 100.0)[0][1] == pytest.approx([2.0, 2.0])
