# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The CPU runtime: every patched symbol exists upstream, is patched, and means what it should."""

import dataclasses
import importlib
import importlib.util
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch

from nemo_ee.runtime import cpu

ROOT = Path(__file__).parents[2]

ON_CPU = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the CPU runtime stays off where CUDA is available"
)


def run_python(code: str) -> str:
    """Runs code in a fresh interpreter, where nothing is patched, and returns what it printed."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@ON_CPU
@pytest.mark.parametrize("patch", cpu.PATCHES, ids=lambda patch: patch.target)
def test_patched_symbol_exists_upstream(patch):
    """Importing the module applies its patches, and that fails where the symbol is gone.

    A name that only Apex defines cannot be looked up, so the source must still use it outside the import.
    """
    module = importlib.import_module(patch.module)
    assert patch.reason and patch.upstream in (cpu.TORCH, cpu.LIGHTNING, cpu.MEGATRON, cpu.NEMO)
    if patch.missing:
        uses = [line for line in Path(module.__file__).read_text().splitlines() if patch.name in line]
        assert [line for line in uses if "import" not in line]
    symbol = module
    for part in patch.name.split("."):
        symbol = getattr(symbol, part)


@ON_CPU
def test_a_symbol_that_upstream_lost_is_an_error():
    patch = cpu.Patch("torch", "Tensor.no_such_method", cpu.TORCH, "test", lambda original: original)
    with pytest.raises(AttributeError, match=r"torch\.Tensor\.no_such_method.*torch 2\.13\.0"):
        patch.apply()


@ON_CPU
def test_enable_twice_changes_nothing_more():
    before = [torch.zeros, torch.Tensor.to, torch.cuda.current_device, list(sys.meta_path)]
    assert cpu.enable()
    assert [torch.zeros, torch.Tensor.to, torch.cuda.current_device, list(sys.meta_path)] == before


@ON_CPU
def test_cuda_means_cpu():
    tensor = torch.zeros(2, device="cuda")
    assert tensor.device.type == "cpu" and tensor.cuda() is tensor
    assert all(
        tensor.to(device).device.type == "cpu" for device in ("cuda", "cuda:0", torch.device("cuda"), 0)
    )
    assert (
        tensor.to(torch.float64).dtype == torch.float64 and tensor.to("cpu", torch.half).dtype == torch.half
    )
    assert torch.ones_like(tensor, device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.nn.Linear(2, 2).cuda().to("cuda").weight.device.type == "cpu"


@ON_CPU
def test_tensor_types_have_their_cuda_names():
    tensor = torch.cuda.LongTensor([1, 2])
    assert isinstance(tensor, torch.cuda.LongTensor) and not isinstance(tensor, torch.cuda.FloatTensor)
    assert tensor.type() == "torch.cuda.LongTensor"
    assert tensor.type(torch.float32).dtype == torch.float32


@ON_CPU
def test_device_contexts_and_torchscript_still_work():
    """Both recognise tensor factories by identity, which a careless wrapper would break."""
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta" and torch.nn.Linear(2, 2).weight.device.type == "meta"

    @torch.jit.script
    def count(n: int):
        return torch.arange(n).sum() + torch.ones(1, dtype=torch.int64)

    assert count(4).item() == 7


@ON_CPU
def test_autocast_reaches_forward_and_backward():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        output = torch.ones(2, 2) @ weight
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert weight.grad.dtype == torch.float32


@ON_CPU
def test_random_state_of_the_device_is_that_of_the_cpu():
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


@ON_CPU
def test_two_norm_stand_in():
    from nemo.collections.nlp.modules.common.megatron import clip_grads

    tensors = [torch.full((3,), 2.0), torch.full((4,), 1.0, dtype=torch.bfloat16)]
    norm, each = clip_grads.multi_tensor_applier(clip_grads.amp_C.multi_tensor_l2norm, None, [tensors], True)
    assert norm.tolist() == [4.0]
    assert each.tolist() == pytest.approx([12**0.5, 2.0])


def test_apexs_kernels_for_cuda_tensors_are_replaced_where_apex_is_installed(monkeypatch):
    clipping = types.ModuleType("clipping")
    clipping.amp_C, clipping.FusedLayerNorm = "Apex's", "Apex's"
    monkeypatch.setitem(sys.modules, "clipping", clipping)
    for name in ("amp_C", "FusedLayerNorm"):
        (patch,) = (patch for patch in cpu.PATCHES if patch.name == name)
        dataclasses.replace(patch, module="clipping").apply()
    assert clipping.amp_C.multi_tensor_l2norm([[torch.full((4,), 2.0)]], False)[0].tolist() == [4.0]
    assert clipping.FusedLayerNorm == "Apex's"


@ON_CPU
def test_enable_too_late_is_an_error():
    code = """
        import sys, types
        from nemo_ee.runtime import cpu
        sys.modules["megatron.core"] = types.ModuleType("megatron.core")
        try:
            cpu.enable()
        except RuntimeError as error:
            print(error)
    """
    assert "megatron.core imported before" in run_python(code)


def test_enable_is_off_where_cuda_is_available():
    code = """
        import os, sys, torch
        torch.cuda.is_available = lambda: True
        from nemo_ee.runtime import cpu
        finders, environment, zeros = list(sys.meta_path), dict(os.environ), torch.zeros
        print(cpu.enable(), finders == sys.meta_path, environment == os.environ, zeros is torch.zeros)
    """
    message, outcome = run_python(code).splitlines()
    assert "CUDA is available" in message and outcome == "False True True True"


def test_importing_the_runtime_changes_nothing():
    code = """
        import os, sys
        finders, environment = list(sys.meta_path), dict(os.environ)
        import nemo_ee.runtime.cpu
        print(finders == sys.meta_path, environment == os.environ, "torch" in sys.modules)
    """
    assert run_python(code).split() == ["True", "True", "False"]
