# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Checks of the pretend GPU, run by `test_pretend_gpu.py` in a process that has two of them."""

import copy
import io
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.support.pretend_gpu.tensor import CudaTensor

OTHER_DEVICE = "same device"


def gpu(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype, device="cuda")


def cpu(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def optimizer_with_state_on_the_cpu():
    weight = nn.Parameter(gpu(3))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = gpu(3)
    optimizer.step()
    optimizer.state[weight]["exp_avg"] = cpu(3)
    optimizer.step()


class MadeOnTheCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return torch.ones(3)


def backward_that_returns_the_cpus():
    weight = gpu(3).requires_grad_()
    MadeOnTheCPU.apply(weight).sum().backward()
    return weight.grad


def backward_that_returns_the_cpus_halfway():
    weight = gpu(3).requires_grad_()
    MadeOnTheCPU.apply(weight * gpu(3)).sum().backward()


def module_with_a_buffer_left_behind():
    norm = nn.BatchNorm1d(3).cuda()
    norm.running_mean = cpu(3)
    norm(gpu(2, 3))


ids, ids_on_cpu = (lambda: gpu(2, dtype=torch.long)), (lambda: cpu(2, dtype=torch.long))
MIXES = {
    "add": lambda: gpu(3) + cpu(3),
    "add reversed": lambda: cpu(3) + gpu(3),
    "add in place": lambda: gpu(3).add_(cpu(3)),
    "add in place to the cpu's": lambda: cpu(3).add_(gpu(3)),
    "add in place to a number of the cpu's": lambda: cpu().add_(gpu()),
    "add to one number of the gpu's": lambda: cpu(3) + gpu(),
    "compare": lambda: gpu(3) == cpu(3),
    "matmul": lambda: gpu(2, 3) @ cpu(3, 2),
    "bmm": lambda: torch.bmm(cpu(1, 2, 3), gpu(1, 3, 2)),
    "addmm": lambda: torch.addmm(cpu(2), gpu(2, 3), gpu(3, 2)),
    "einsum": lambda: torch.einsum("ij,jk->ik", gpu(2, 3), cpu(3, 2)),
    "cat": lambda: torch.cat([gpu(3), cpu(3)]),
    "stack": lambda: torch.stack([gpu(3), cpu(3)]),
    "stack of numbers": lambda: torch.stack([gpu(), cpu()]),
    "embedding": lambda: F.embedding(ids_on_cpu(), gpu(5, 3)),
    "embedding on the cpu": lambda: F.embedding(ids(), cpu(5, 3)),
    "linear's bias": lambda: F.linear(gpu(2, 3), gpu(4, 3), cpu(4)),
    "linear's input": lambda: F.linear(cpu(2, 3), gpu(4, 3)),
    "layer norm's weight": lambda: F.layer_norm(gpu(2, 3), (3,), cpu(3)),
    "cross entropy's targets": lambda: F.cross_entropy(gpu(2, 5), ids_on_cpu()),
    "where's condition": lambda: torch.where(cpu(3, dtype=torch.bool), gpu(3), gpu(3)),
    "where": lambda: torch.where(gpu(3, dtype=torch.bool), gpu(3), cpu(3)),
    "out": lambda: torch.add(gpu(3), gpu(3), out=cpu(3)),
    "out of a reduction": lambda: torch.sum(gpu(3, 2), 0, out=cpu(2)),
    "gather": lambda: gpu(3, 3).gather(0, cpu(1, 3, dtype=torch.long)),
    "scatter": lambda: gpu(3, 3).scatter_(0, gpu(1, 3, dtype=torch.long), cpu(1, 3)),
    "index_select": lambda: gpu(3, 3).index_select(0, ids_on_cpu()),
    "index_add": lambda: gpu(3, 3).index_add_(0, ids(), cpu(2, 3)),
    "index_copy": lambda: gpu(3, 3).index_copy_(0, ids_on_cpu(), gpu(2, 3)),
    "index of the cpu's by the gpu's": lambda: cpu(3)[ids()],
    "values put by index": lambda: gpu(3, 3).__setitem__(ids(), cpu(2, 3)),
    "masked_fill": lambda: gpu(3).masked_fill(cpu(3, dtype=torch.bool), 0.0),
    "masked_select": lambda: gpu(3).masked_select(cpu(3, dtype=torch.bool)),
    "attention's mask": lambda: F.scaled_dot_product_attention(*[gpu(1, 1, 2, 8)] * 3, attn_mask=cpu(2, 2)),
    "attention's values": lambda: F.scaled_dot_product_attention(*[gpu(1, 1, 2, 8)] * 2, cpu(1, 1, 2, 8)),
    "equal": lambda: torch.equal(gpu(3), cpu(3)),
    "foreach": lambda: torch._foreach_add_([gpu(3)], [cpu(3)]),
    "maximum": lambda: torch.maximum(gpu(3), cpu(3)),
    "lerp": lambda: gpu(3).lerp_(cpu(3), 0.5),
    "data": lambda: setattr(gpu(3), "data", cpu(3)),
    "gradient": lambda: setattr(gpu(3).requires_grad_(), "grad", cpu(3)),
    "gradient to begin with": lambda: (gpu(3).requires_grad_() * 2).backward(cpu(3)),
    "gradient to begin with, grad()": lambda: torch.autograd.grad(
        (x := gpu(3).requires_grad_()) * 2, x, cpu(3)
    ),
    "gradient made on the cpu": backward_that_returns_the_cpus,
    "gradient made on the cpu, halfway": backward_that_returns_the_cpus_halfway,
    "module's input": lambda: nn.Linear(3, 2).cuda()(cpu(2, 3)),
    "module left on the cpu": lambda: nn.Linear(3, 2)(gpu(2, 3)),
    "module's buffer": module_with_a_buffer_left_behind,
    "optimizer's state": optimizer_with_state_on_the_cpu,
    "fused optimizer's steps": lambda: torch._fused_adamw_(
        *[[gpu(3)] for _ in range(4)],
        [],
        [cpu()],
        lr=0.1,
        beta1=0.9,
        beta2=0.9,
        weight_decay=0.0,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    ),  # fmt: skip
    "a view of the gpu's": lambda: gpu(2, 3).view(-1)[1:] + cpu(5),
    "what inference mode made": torch.inference_mode()(lambda: gpu(3) * 2 + cpu(3)),
}


@pytest.mark.parametrize("mix", MIXES)
def test_mixing_is_refused(mix):
    with pytest.raises(RuntimeError, match=OTHER_DEVICE):
        MIXES[mix]()


@pytest.mark.parametrize("mix", ["add", "matmul", "index of the cpu's by the gpu's"])
def test_mixing_is_refused_in_other_threads(mix):
    seen = []

    def run():
        try:
            MIXES[mix]()
        except RuntimeError as error:
            seen.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert OTHER_DEVICE in seen[0]


def test_random_numbers_come_from_the_devices_generator():
    for draw in (
        lambda g: torch.randn(3, device="cuda", generator=g),
        lambda g: torch.multinomial(gpu(3), 1, generator=g),
        lambda g: gpu(3).uniform_(generator=g),
    ):
        with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
            draw(torch.Generator())


def test_numpy_pinning_and_other_gpus_are_refused():
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        gpu(3).numpy()
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        import numpy

        numpy.asarray(gpu(3))
    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned"):
        gpu(3).pin_memory()
    with pytest.raises(RuntimeError, match="cuda:1 is used in a process whose device is cuda:0"):
        torch.zeros(3, device="cuda:1")
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.cuda.set_device(2)


def made_in_a_context():
    with torch.device("cuda"):
        return torch.ones(2)


TAKEN = {
    "a number of the cpu's": (lambda: gpu(3) + torch.tensor(2.0), 3.0),
    "a number of the cpu's, first": (lambda: torch.tensor(2.0) * gpu(3), 2.0),
    "a number filled in": (lambda: gpu(3).masked_fill(gpu(3) > 0, torch.tensor(5.0)), 5.0),
    "where with a number": (lambda: torch.where(gpu(3) > 0, torch.tensor(4.0), gpu(3)), 4.0),
    "indices of the cpu's": (lambda: gpu(3)[torch.tensor([0, 2])], 1.0),
    "a copy to the gpu": (lambda: gpu(3).copy_(cpu(3) * 7), 7.0),
    "a copy to the cpu": (lambda: cpu(3).copy_(gpu(3) * 7), 7.0),
    "zeros_like": (lambda: torch.zeros_like(gpu(3)), 0.0),
    "full": (lambda: torch.full((3,), 2.5, device="cuda"), 2.5),
    "new": (lambda: gpu(3).new_full((2,), 3.0), 3.0),
    "new_tensor": (lambda: gpu(3).new_tensor([3.0]), 3.0),
    "tensor": (lambda: torch.tensor([3.0], device="cuda"), 3.0),
    "as_tensor": (lambda: torch.as_tensor([3.0], device="cuda:0"), 3.0),
    "arange": (lambda: torch.arange(2, 3, device=torch.device("cuda")), 2.0),
    "default device": (made_in_a_context, 1.0),
    "to": (lambda: cpu(3).to("cuda"), 1.0),
    "to, by number": (lambda: cpu(3).to(0), 1.0),
    "to, with type": (lambda: cpu(3).to("cuda", torch.float64, non_blocking=True), 1.0),
    "to, like another": (lambda: cpu(3).to(gpu(1, dtype=torch.float64)), 1.0),
    "type": (lambda: cpu(3).type("torch.cuda.LongTensor"), 1.0),
    "cuda": (lambda: cpu(3).cuda(non_blocking=True), 1.0),
    "dropout": (lambda: F.dropout(gpu(3), 0.5, training=False), 1.0),
    "module": (lambda: nn.LayerNorm(3, elementwise_affine=True).cuda().bias, 0.0),
    "module, with type": (lambda: nn.LayerNorm(3).to("cuda", torch.bfloat16).weight, 1.0),
}


@pytest.mark.parametrize("way", TAKEN)
def test_what_a_gpu_takes(way):
    make, value = TAKEN[way]
    made = make()
    assert (made.device.type == "cuda") == (way != "a copy to the cpu")
    assert all(each == value for each in made.cpu().flatten().tolist())


def test_it_says_that_it_is_on_the_gpu():
    tensor = cpu(3).cuda()
    assert tensor.device == torch.device("cuda", 0) and tensor.is_cuda and not tensor.is_cpu
    assert tensor.get_device() == 0 and tensor.type() == "torch.cuda.FloatTensor"
    assert isinstance(tensor, torch.cuda.FloatTensor) and not isinstance(tensor, torch.cuda.HalfTensor)
    assert torch.cuda.LongTensor([1, 2]).dtype == torch.long
    assert tensor.cuda() is tensor and tensor.to("cuda") is tensor
    assert tensor.to("cpu").device.type == "cpu" and tensor.to(cpu(1)).device.type == "cpu"
    assert tensor.to(torch.float64).is_cuda and tensor.double().is_cuda
    with torch.inference_mode():
        assert (tensor + 1)[1:].is_cuda


def test_copies_are_copies_and_views_are_views():
    host = cpu(4)
    tensor = host.cuda()
    tensor[1:3].view(1, 2).add_(1)
    assert tensor.tolist() == [1, 2, 2, 1] and host.tolist() == [1, 1, 1, 1]
    back = tensor.cpu()
    tensor.zero_()
    assert back.tolist() == [1, 2, 2, 1]


def test_parameters_may_be_views_of_one_buffer():
    """As Megatron's distributed optimizer keeps them, and their gradients."""
    linear = nn.Linear(2, 2, bias=False).cuda()
    weight, buffer, gradients = linear.weight, torch.zeros(6, device="cuda"), torch.zeros(6, device="cuda")
    buffer[1:5].copy_(weight.detach().flatten())
    weight.data = buffer[1:5].view(2, 2)
    weight.main_grad = gradients[1:5].view(2, 2)
    accumulate = weight.expand_as(weight).grad_fn.next_functions[0][0]
    accumulate.register_hook(lambda *_: setattr(weight, "main_grad", weight.main_grad.add_(weight.grad)))
    linear(gpu(1, 2)).sum().backward()
    assert gradients.tolist() == [0, 1, 1, 1, 1, 0]
    buffer.fill_(2)
    assert linear(gpu(1, 2)).tolist() == [[4, 4]] and linear.weight is weight


def test_moved_modules_keep_their_parameters_and_ties():
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    first.weight.mark = "kept"
    model, weight = nn.Sequential(first, second), first.weight
    model.cuda()
    assert first.weight is weight is second.weight and weight.is_cuda and weight.mark == "kept"
    assert isinstance(weight, nn.Parameter) and weight.requires_grad and len(list(model.parameters())) == 1
    direct = nn.Parameter(cpu(3))
    direct.data = direct.data.cuda()
    assert direct.is_cuda and isinstance(direct, nn.Parameter) and direct.requires_grad
    model.cpu()
    assert not weight.is_cuda and first.weight is weight is second.weight


def test_gradients_cross():
    host = cpu(3).requires_grad_()
    (host.cuda() * 3).cpu().sum().backward()
    assert host.grad.tolist() == [3, 3, 3] and not isinstance(host.grad, CudaTensor)
    device = gpu(3).requires_grad_()
    (device.cpu() * 2).cuda().sum().backward()
    assert device.grad.is_cuda and device.grad.tolist() == [2, 2, 2]


@pytest.mark.parametrize("fused", [False, True])
def test_training_equals_the_cpus(fused):
    losses = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 8), nn.LayerNorm(8), nn.Linear(8, 7)).to(device)
        tokens = torch.tensor([1, 5, 2, 6, 0], device=device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        losses[device] = []
        for _ in range(3):
            loss = F.cross_entropy(model(tokens[:-1]), tokens[1:])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses[device].append(loss.item())
        assert all(
            value.device.type == device for value in optimizer.state[model[2].weight].values() if value.dim()
        )
    assert losses["cpu"] == losses["cuda"] and losses["cuda"][2] < losses["cuda"][0]


@pytest.mark.parametrize("weights_only", [False, True])
def test_files_return_where_they_were(weights_only):
    model = nn.Linear(2, 2).cuda()
    model.weight.mark = 3
    file = io.BytesIO()
    torch.save(dict(state=model.state_dict(), view=gpu(4)[1:3]), file)
    for where, kind in ((None, "cuda"), ("cpu", "cpu"), (torch.device("cuda"), "cuda")):
        file.seek(0)
        read = torch.load(file, map_location=where, weights_only=weights_only)
        assert {value.device.type for value in (read["view"], *read["state"].values())} == {kind}
        assert read["state"]["weight"].tolist() == model.weight.tolist()
    file = io.BytesIO()
    torch.save(cpu(3), file)
    file.seek(0)
    assert torch.load(file).device.type == "cpu"


def test_copied_and_pickled_modules_stay_on_the_gpu():
    model = nn.Linear(2, 2).cuda()
    model.weight.mark = 3
    for made in (copy.deepcopy(model), torch.load(_saved(model), weights_only=False)):
        assert made.weight.is_cuda and isinstance(made.weight, nn.Parameter) and made.weight.mark == 3
        assert made.weight is not model.weight and made.weight.tolist() == model.weight.tolist()


def _saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_random_states_are_the_hosts():
    state = torch.cuda.get_rng_state()
    first = torch.rand(3, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.rand(3, device="cuda").tolist() == first.tolist() and state.device.type == "cpu"
