# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which kernels torch's Adam and AdamW take, and that the loss scaler of half precision works with them."""

import pytest
import torch
from omegaconf import OmegaConf

from nemo_ee.models.fused_adam import choose_kernels, keep_kernels
from tests.support.tiny_gpt import tiny_model, tiny_model_config

CHOSEN = [
    (dict(), True),
    (dict(fused=None), True),
    (dict(fused=True), True),
    (dict(fused=False), False),
    (dict(foreach=True), False),
    (dict(fused=False, foreach=True), False),
]


def optimizer_of(kind: type, settings: dict, dtype=torch.float64) -> torch.optim.Optimizer:
    """As NeMo makes it, which hands all settings on."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((5, 7), (3,))]
    groups = [dict(params=parameters[:1]), dict(params=parameters[1:], weight_decay=0.0)]
    made = kind(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, **settings)
    choose_kernels(made, OmegaConf.create(settings))
    return made


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters_of(optimizer):
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    optimizer.step()


@pytest.mark.parametrize(("settings", "fused"), CHOSEN)
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_fused_unless_told_otherwise_and_equal(kind, settings, fused):
    mine, plain = optimizer_of(kind, settings), optimizer_of(kind, dict(fused=False, foreach=False))
    assert all(group["fused"] is fused for group in mine.param_groups)
    for number in range(6):
        step(mine, number)
        step(plain, number)
    for found, expected in zip(parameters_of(mine), parameters_of(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        for part in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(mine.state[found][part], plain.state[expected][part])


def test_other_optimizers_stay_as_they_are():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    before = dict(optimizer.param_groups[0])
    choose_kernels(optimizer, OmegaConf.create({}))
    keep_kernels([{}], optimizer)
    assert optimizer.param_groups[0] == before


@pytest.mark.parametrize("saved_fused", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_loaded_state_takes_this_runs_kernels(fused, saved_fused):
    saved = optimizer_of(torch.optim.AdamW, dict(fused=saved_fused))
    whole, mine = (optimizer_of(torch.optim.AdamW, dict(fused=fused)) for _ in range(2))
    for number in range(3):
        step(saved, number)
        step(whole, number)
    state = saved.state_dict()
    keep_kernels(state["param_groups"], mine)
    mine.load_state_dict(state)
    with torch.no_grad():
        for to, source in zip(parameters_of(mine), parameters_of(saved), strict=True):
            to.copy_(source)
    assert all(group["fused"] is fused for group in mine.param_groups)
    for number in range(3, 6):
        step(mine, number)
        step(whole, number)
    for found, expected in zip(parameters_of(mine), parameters_of(whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        assert mine.state[found]["step"] == 6


@pytest.mark.parametrize("given", [None, True])
@pytest.mark.parametrize("gradient", [8.0, float("inf")], ids=["finite", "infinite"])
def test_the_loss_scaler_undoes_its_scale_before_gradients_are_clipped(gradient, given, monkeypatch):
    from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling

    from nemo_ee.models.grad_scaler import EarlyExitGradScaler

    tiny_model(tiny_model_config())  # brings up the groups over which infinities are looked for
    # torch turns a scaler off that finds no GPU.
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    scaler = EarlyExitGradScaler(init_scale=4.0, growth_interval=100, hysteresis=1)
    scaler.scale(torch.ones(()))
    optimizer = optimizer_of(torch.optim.AdamW, dict(fused=given), torch.float32)
    assert optimizer.param_groups[0]["fused"] and not _optimizer_handles_unscaling(optimizer)
    before = [parameter.clone() for parameter in parameters_of(optimizer)]
    for parameter in parameters_of(optimizer):
        parameter.grad = torch.full_like(parameter, gradient)
    scaler.unscale_(optimizer)  # as Lightning does for optimizers that do not
    if gradient == 8.0:
        assert all((parameter.grad == 2.0).all() for parameter in parameters_of(optimizer))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.optimizer_update_skipped is (gradient == float("inf"))
    unchanged = [old.equal(new) for old, new in zip(before, parameters_of(optimizer), strict=True)]
    assert unchanged == [gradient == float("inf")] * 2
    if gradient == 8.0:
        plain = optimizer_of(torch.optim.AdamW, dict(fused=False), torch.float32)
        for parameter in parameters_of(plain):
            parameter.grad = torch.full_like(parameter, 2.0)
        plain.step()
        for found, expected in zip(parameters_of(optimizer), parameters_of(plain), strict=True):
            torch.testing.assert_close(found, expected)
