# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Checks of what the pretend GPU counts as waits, run by `test_pretend_gpu.py` in a process that has two of them."""

import threading

import pytest
import torch
from torch.nn import functional as F

from tests.support.pretend_gpu import waits
from tests.unit.pretend_gpu_checks import cpu, gpu, ids, ids_on_cpu

# What torch waits for, and how often. The counts are those of CUDA's kernels.
WAITS = {
    "item": (lambda: gpu().item(), 1),
    "float": (lambda: float(gpu()), 1),
    "int, as an index": (lambda: [0, 1][gpu(dtype=torch.long)], 1),
    "bool": (lambda: bool(gpu() > 0), 1),
    "if": (lambda: 1 if gpu(1) else 0, 1),
    "tolist": (lambda: gpu(3).tolist(), 1),
    "cpu": (lambda: gpu(3).cpu(), 1),
    "to the cpu": (lambda: gpu(3).to("cpu"), 1),
    "copied to the cpu": (lambda: cpu(3).copy_(gpu(3)), 1),
    "copied to pinned memory": (lambda: cpu(3).pin_memory().copy_(gpu(3), non_blocking=True), 0),
    "upload": (lambda: cpu(3).cuda(), 1),
    "upload without waiting": (lambda: cpu(3).cuda(non_blocking=True), 0),
    "tensor": (lambda: torch.tensor([1, 2], device="cuda"), 1),
    "tensor of the gpu's numbers": (lambda: torch.tensor([[gpu()], [gpu()]]), 2),
    "contains": (lambda: 1.0 in gpu(3), 1),
    "argwhere": (lambda: torch.argwhere(gpu(3)), 1),
    "arange to a number of the gpu's": (lambda: torch.arange(gpu(), device="cuda"), 1),
    "factories": (lambda: (torch.arange(3, device="cuda"), torch.full((2,), 2.0, device="cuda")), 0),
    "nonzero": (lambda: gpu(3).nonzero(), 1),
    "where of a condition": (lambda: torch.where(gpu(3) > 0), 1),
    "masked_select": (lambda: gpu(3).masked_select(gpu(3) > 0), 1),
    "a mask as index": (lambda: gpu(3)[gpu(3) > 0], 1),
    "values put by a mask": (lambda: gpu(3).__setitem__(gpu(3) > 0, gpu(3)), 1),
    "a number put by a mask": (lambda: gpu(3).__setitem__(gpu(3) > 0, 2.0), 0),
    "a number put by indices": (lambda: gpu(3).__setitem__(ids(), 2.0), 1),
    "a number of the gpu's put by indices": (lambda: gpu(3).__setitem__(ids(), gpu()), 0),
    "a number put in a slice": (lambda: gpu(3).__setitem__(slice(1, 3), 2.0), 0),
    "a number put in one place": (lambda: gpu(3).__setitem__(1, 2.0), 1),
    "indices of the gpu's": (lambda: gpu(3)[ids()], 0),
    "indices of the cpu's": (lambda: gpu(3)[ids_on_cpu()], 1),
    "a number of the gpu's as index": (lambda: gpu(3)[gpu(dtype=torch.long)], 1),
    "a slice to a number of the gpu's": (lambda: gpu(3)[: gpu(dtype=torch.long)], 1),
    "equal": (lambda: torch.equal(gpu(3), gpu(3)), 1),
    "allclose": (lambda: torch.allclose(gpu(3), gpu(3)), 1),
    "unique": (lambda: torch.unique(gpu(3)), 1),
    "bincount": (lambda: torch.bincount(ids()), 1),
    "repeat_interleave": (lambda: torch.repeat_interleave(gpu(2), ids()), 1),
    "repeat_interleave, size given": (lambda: torch.repeat_interleave(gpu(2), ids(), output_size=2), 0),
    "repeat_interleave by a number": (lambda: torch.repeat_interleave(gpu(2), 2), 0),
    "cholesky": (lambda: torch.linalg.cholesky(torch.eye(2, device="cuda")), 1),
    "cholesky, out": (lambda: torch.linalg.cholesky(x := torch.eye(2, device="cuda"), out=x), 1),
    "cholesky, unchecked": (lambda: torch.linalg.cholesky_ex(torch.eye(2, device="cuda")), 0),
    "print": (lambda: str(gpu(3)), 1),
    "format": (lambda: f"{gpu():.2f}", 1),
    "synchronize": (torch.cuda.synchronize, 1),
    "an event": (lambda: torch.cuda.Event().synchronize(), 1),
    "arithmetic": (lambda: torch.softmax(gpu(3) * 2, 0).cumsum(0).sort()[0].argmax(), 0),
    "where": (lambda: torch.where(gpu(3) > 0, gpu(3), 0.0), 0),
    "clamp, gather, scatter": (lambda: gpu(2, 2).gather(1, gpu(2, 1, dtype=torch.long).clamp(0, 1)), 0),
    "backward": (lambda: (gpu(3, 3).requires_grad_() @ gpu(3)).sum().backward(), 0),
    "cross entropy": (lambda: F.cross_entropy(gpu(2, 5).requires_grad_(), ids()).backward(), 0),
}


@pytest.mark.parametrize("what", WAITS)
def test_waits_are_counted(what):
    run, count = WAITS[what]
    with waits.counting() as seen:
        run()
    assert len(seen) == count, waits.describe(seen)


@pytest.mark.parametrize("what", sorted(WAITS.keys() - {"backward", "cross entropy"}))
def test_waits_are_counted_in_inference_mode(what):
    """In which texts are generated: torch then hands operations on undivided, `aten.item` for example."""
    run, count = WAITS[what]
    with torch.inference_mode(), waits.counting() as seen:
        run()
    assert len(seen) == count, waits.describe(seen)


def test_waits_are_counted_in_other_threads_and_say_where():
    with waits.counting() as seen:
        thread = threading.Thread(target=lambda: gpu().item())
        thread.start()
        thread.join()
    assert [wait.kind for wait in seen] == ["aten._local_scalar_dense.default"]
    assert "pretend_gpu_wait_checks.py" in seen[0].line and waits.describe(seen).startswith("1 x aten._local")


def test_graphs_repeat_and_refuse_to_wait():
    source, graph = gpu(3), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = source * 2 + 1
    source.fill_(5)
    graph.replay()
    assert result.tolist() == [11, 11, 11]
    for wait in (
        lambda: source.sum().item(),
        lambda: source.cpu(),
        lambda: source[source > 0],
        torch.cuda.synchronize,
    ):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                wait()
    assert not torch.cuda.is_current_stream_capturing() and source.sum().item() == 15
