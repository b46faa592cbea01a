# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Stochastic depth: which samples skip which layers."""

import torch

from nemo_ee.modeling.layer_dropout import LayerDropout, before_backward


def test_samples_skip_at_the_rate_and_reproducibly():
    kept = torch.stack([LayerDropout({3: 0.25}, (1, 5, index, 0)).kept(3, 64) for index in range(200)])
    assert abs(kept.float().mean() - 0.75) < 0.015
    assert kept[7].equal(LayerDropout({3: 0.25}, (1, 5, 7, 0)).kept(3, 64))
    for other in ((2, 5, 7, 0), (1, 6, 7, 0), (1, 5, 8, 0), (1, 5, 7, 1)):
        assert not kept[7].equal(LayerDropout({3: 0.25}, other).kept(3, 64))
    assert not kept[7].equal(LayerDropout({4: 0.25}, (1, 5, 7, 0)).kept(4, 64))


def test_a_skipped_layer_is_the_identity():
    dropout = LayerDropout({1: 0.5}, (0, 0, 0, 0))
    before, after = torch.zeros(5, 16, 3), torch.ones(5, 16, 3)
    out = dropout(1, before, after)
    kept = dropout.kept(1, 16)
    assert 0 < kept.sum() < 16
    assert (out[:, kept] == 1).all() and (out[:, ~kept] == 0).all()
    assert dropout(2, before, after) is after


def test_a_layer_that_all_samples_go_through_is_left_alone():
    dropout = LayerDropout({1: 0.01}, (0, 0, 0, 0))
    before, after = torch.zeros(5, 4, 3), torch.ones(5, 4, 3)
    assert dropout.kept(1, 4).all() and dropout(1, before, after) is after


def test_layers_that_all_samples_skip_have_gradients_of_zero():
    """Gradients that are reduced while others are computed are waited for, from every parameter."""
    dropout = LayerDropout({1: 1.0}, (0, 0, 0, 0))
    before, weight = torch.ones(5, 4, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    dropout(1, before, before * weight).sum().backward()
    assert (before.grad == 1).all() and (weight.grad == 0).all()


def test_before_backward_runs_when_the_gradient_comes():
    seen = []
    x = torch.ones(3, requires_grad=True)
    y = before_backward(2 * x, lambda: seen.append(x.grad))
    assert y.tolist() == [2, 2, 2] and y._base is None and seen == []
    y.sum().backward()
    assert seen == [None] and x.grad.tolist() == [2, 2, 2]
