# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Trainer settings that a machine cannot run, the loss scaler, and optimizers that were saved before a step."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf

from nemo_ee.models.runs import trainer_builder
from tests.support.tiny_gpt import tiny_model, tiny_model_config

FAULTY = {
    "no GPU": (dict(accelerator="gpu"), False, "accelerator", "no GPU", "auto or cpu"),
    "a GPU in the way": (dict(accelerator="cpu"), True, "accelerator", "still use", "CUDA_VISIBLE_DEVICES="),
    "half precision": (dict(precision="16-mixed"), False, "precision", "needs a GPU", "bf16 or 32"),
    "inference mode": (dict(inference_mode=True), True, "inference_mode", "rotary", "false"),
}


@pytest.mark.parametrize("case", FAULTY)
def test_settings_that_this_machine_cannot_run(case):
    changes, gpu, key, rule, remedy = FAULTY[case]
    (fault,) = trainer_builder._faults(OmegaConf.create(changes), gpu)
    assert fault.key == f"trainer.{key}" and rule in fault.rule and remedy in fault.remedy


@pytest.mark.parametrize(
    ("accelerator", "gpu"), [("auto", True), ("gpu", True), ("auto", False), ("cpu", False)]
)
def test_settings_that_it_can_run(accelerator, gpu):
    """A GPU is used wherever it is: no setting asks for Apex."""
    assert (
        trainer_builder._faults(OmegaConf.create(dict(accelerator=accelerator, precision="bf16")), gpu) == []
    )


def test_a_notebook_has_trainers_of_one_process(monkeypatch):
    """Where nothing is started, nothing needs a script."""
    connector = "lightning.pytorch.trainer.connectors.accelerator_connector"
    monkeypatch.setattr(f"{connector}._IS_INTERACTIVE", True)
    trainer = dict(devices=1, precision=32, logger=False)
    cfg = OmegaConf.create(dict(model=dict(mcore_gpt=True), trainer=trainer))
    assert trainer_builder.EarlyExitTrainerBuilder(cfg).create_trainer().world_size == 1
    cfg.trainer.devices = 2
    with pytest.raises(MisconfigurationException, match="Run your code as a script"):
        trainer_builder.EarlyExitTrainerBuilder(cfg).create_trainer()


def test_the_trainer_validates_without_inference_mode():
    cfg = dict(model=dict(mcore_gpt=True), trainer=dict(devices=1, precision=32, logger=False))
    trainer = trainer_builder.EarlyExitTrainerBuilder(OmegaConf.create(cfg)).create_trainer()
    assert not trainer.fit_loop.epoch_loop.val_loop.inference_mode


@pytest.mark.parametrize("gradient", [None, 8.0, float("inf")], ids=["no parameters", "finite", "infinite"])
def test_a_stage_without_parameters_steps_with_the_others(gradient, monkeypatch):
    """It has found no infinity, where torch's scaler raises."""
    from nemo_ee.models.grad_scaler import EarlyExitGradScaler

    tiny_model(tiny_model_config())  # brings up the groups over which infinities are looked for
    # torch turns a scaler off that finds no GPU.
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    scaler = EarlyExitGradScaler(init_scale=4.0, growth_interval=100, hysteresis=1)
    parameter = torch.nn.Parameter(torch.ones(2))
    scaler.scale(torch.ones(()))
    if gradient is not None:
        parameter.grad = torch.full((2,), gradient)
    optimizer = torch.optim.SGD([{"params": [parameter] if gradient else []}], lr=0.5)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.optimizer_update_skipped is (gradient == float("inf"))
    assert scaler.get_scale() == (2.0 if gradient == float("inf") else 4.0)
    assert parameter.tolist() == ([0.0, 0.0] if gradient == 8.0 else [1.0, 1.0])


def test_an_optimizer_that_never_stepped_can_step_after_it_was_saved():
    from nemo.core.optim.optimizers import init_optimizer_states

    from nemo_ee.models.strategy import _complete_adam_states

    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    init_optimizer_states(optimizer)
    _complete_adam_states(optimizer)
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.state[parameter]["step"] == 1
