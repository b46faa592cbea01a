# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Stand-ins for what a machine lacks: each symbol exists upstream, is replaced, and means what it should."""

import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from nemo_ee.runtime import apex_stand_ins, compiler_stand_ins, cuda_stand_ins, patching, stand_ins
from tests.support.fake_apex import write_apex

ROOT = Path(__file__).parents[2]

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is CUDA, nothing stands in for it")
PATCHES = (*cuda_stand_ins.PATCHES, *compiler_stand_ins.PATCHES, *apex_stand_ins.PATCHES)


def run_python(code: str) -> str:
    """Runs code in a fresh interpreter, where nothing is patched, and returns what it printed."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@ON_CPU
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_patched_symbol_exists_upstream(patch):
    """Importing the module applies its patches, and that fails where the symbol is gone.

    A name that only Apex defines cannot be looked up, so the source must still use it outside the import.
    """
    module = importlib.import_module(patch.module)
    assert patch.reason and patch.upstream in (
        patching.TORCH,
        patching.LIGHTNING,
        patching.MEGATRON,
        patching.NEMO,
    )
    if patch.missing:
        uses = [line for line in Path(module.__file__).read_text().splitlines() if patch.name in line]
        assert [line for line in uses if "import" not in line]
    symbol = module
    for part in patch.name.split("."):
        symbol = getattr(symbol, part)


@ON_CPU
def test_a_symbol_that_upstream_lost_is_an_error():
    patch = patching.Patch(
        "torch", "Tensor.no_such_method", patching.TORCH, "test", lambda original: original
    )
    with pytest.raises(AttributeError, match=r"torch\.Tensor\.no_such_method.*torch 2\.13\.0"):
        patch.apply()


@ON_CPU
def test_enable_twice_changes_nothing_more():
    before = [torch.zeros, torch.Tensor.to, torch.cuda.current_device, list(sys.meta_path)]
    stand_ins.enable()
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


NAMES_OF_APEX = """
    build_model.set_defaults_if_not_set_tensor_model_parallel_attributes
    clip_grads.amp_C clip_grads.multi_tensor_applier
    nlp_overrides.McoreDistributedOptimizer nlp_overrides.MegatronDistributedFusedAdam
    utils.FastLayerNorm utils.FusedLayerNorm utils.MixedFusedRMSNorm utils.listify_model
""".split()
FLAGS = ["nlp_overrides.HAVE_APEX", "optimizer_with_main_params.HAVE_APEX"]

IMPORT_ALL = """
    import importlib, torch
    torch.cuda.is_available = lambda: {gpu}
    zeros, to, device = torch.zeros, torch.Tensor.to, torch.cuda.current_device
    from nemo_ee.runtime import apex_stand_ins, stand_ins
    stand_ins.enable()
    modules = {{name: importlib.import_module(name) for name in {{p.module for p in apex_stand_ins.PATCHES}}}}
    print(torch.zeros is zeros and torch.Tensor.to is to and torch.cuda.current_device is device)
    supplied = {{".".join(target.split(".")[-2:]) for target in stand_ins.supplied()}}
    print(*sorted(supplied & set({names})))
"""


def import_all(gpu: bool, before: str = "", after: str = "") -> list[str]:
    """Enables stand-ins and imports all modules that use Apex.

    Returns:
        Lines: whether torch's symbols are its own, which names of Apex are ours, and what `after` prints.
    """
    code = IMPORT_ALL.format(gpu=gpu, names=NAMES_OF_APEX + FLAGS)
    printed = run_python(before + textwrap.dedent(code) + textwrap.dedent(after)).splitlines()
    return printed[next(index for index, line in enumerate(printed) if line in ("True", "False")) :]


def test_a_gpu_without_apex_is_given_the_names_and_flags_of_apex_alone():
    untouched, supplied = import_all(gpu=True)
    assert untouched == "True" and supplied.split() == sorted(NAMES_OF_APEX + FLAGS)


ORIGINS = f"""
    for name in {NAMES_OF_APEX}:
        for module in modules.values():
            value = getattr(module, name.split(".")[1], None)
            if value is not None and module.__name__.endswith(name.split(".")[0]):
                print(name, getattr(value, "__module__", value.__name__).partition(".")[0])
    clipping = modules["nemo.collections.nlp.modules.common.megatron.clip_grads"]
    tensors = [[torch.full((4,), 2.0)]]
    print(clipping.multi_tensor_applier(clipping.amp_C.multi_tensor_l2norm, None, tensors, False))
"""
OPTIMIZERS = ["nlp_overrides.McoreDistributedOptimizer", "nlp_overrides.MegatronDistributedFusedAdam"]


@pytest.mark.parametrize("gpu", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_apex_that_is_there_is_used(gpu, tmp_path):
    """On a CPU, too, but for the kernels."""
    before = write_apex(tmp_path, transformer_engine=True)
    untouched, supplied, *origins, norm = import_all(gpu, before, ORIGINS)
    assert untouched == str(gpu) and supplied.split() == ([] if gpu else ["clip_grads.amp_C"])
    expected = dict.fromkeys(NAMES_OF_APEX, "apex") | dict.fromkeys(OPTIMIZERS, "nemo")  # NeMo's wrappers
    expected |= {"clip_grads.amp_C": "amp_C" if gpu else "nemo_ee"}
    assert dict(line.split() for line in origins) == expected
    assert norm == ("('chunk', None, [[tensor([2., 2., 2., 2.])]], False)" if gpu else "(tensor([4.]), None)")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"transformer_engine": False}, [FLAGS[0], *OPTIMIZERS]),
        (
            {"transformer_engine": True, "amp_C": "raise ImportError('undefined symbol')"},
            ["clip_grads.amp_C", "clip_grads.multi_tensor_applier", FLAGS[1]],
        ),
    ],
    ids=["without Transformer Engine", "without its kernels"],
)
def test_what_nemo_misses_of_an_apex_that_is_there_is_supplied(changes, missing, tmp_path):
    _, supplied = import_all(gpu=True, before=write_apex(tmp_path, **changes))
    assert supplied.split() == sorted(missing)


def test_the_two_norm_agrees_with_megatrons_own():
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    tensors = [[torch.randn(3, 5), torch.randn(7), torch.zeros(0)]]
    ours, theirs = (
        norm(65536, None, tensors, False)[0]
        for norm in (apex_stand_ins.MultiTensor.multi_tensor_l2norm, local_multi_tensor_l2_norm)
    )
    torch.testing.assert_close(ours, theirs)
    assert clip_grads.l2_norm_impl.__module__ != "megatron.core.utils"


def test_two_norm_stand_in():
    tensors = [torch.full((3,), 2.0), torch.full((4,), 1.0, dtype=torch.bfloat16)]
    norm, each = apex_stand_ins.MultiTensor.multi_tensor_l2norm(65536, None, [tensors], True)
    assert norm.tolist() == [4.0] and norm.dtype == each.dtype == torch.float32
    assert each.tolist() == pytest.approx([12**0.5, 2.0])


@pytest.mark.parametrize(
    "dtypes", ["bfloat16", "float16", "float32", "float64", "bfloat16 float32", "bfloat16 float64"]
)
def test_two_norm_is_computed_in_float32_at_least(dtypes):
    """A norm rounded to bfloat16 would be off by up to 0.4 %; squares of large float16 numbers would overflow."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        (100 * torch.randn(50, 7, generator=generator)).to(getattr(torch, dtype))
        for dtype in dtypes.split()
        for _ in range(3)
    ]
    norm, _ = apex_stand_ins.MultiTensor.multi_tensor_l2norm(65536, None, [tensors], False)
    expected = torch.cat([tensor.double().flatten() for tensor in tensors]).norm()
    torch.testing.assert_close(norm.double(), expected.reshape(1), rtol=1e-6, atol=0)
    assert norm.dtype == torch.float32, "ranks without gradients send such a norm"


def test_compilation_is_left_to_gpus_that_have_a_compiler():
    code = """
        import torch
        from nemo_ee.runtime import compiler_stand_ins, stand_ins
        for gpu, compiler in (True, True), (True, False), (False, True):
            torch.cuda.is_available = lambda: gpu
            compiler_stand_ins.can_compile = lambda: compiler
            stand_ins._finder = None
            stand_ins.enable()
            print("megatron.core.jit" in stand_ins._finder.modules)
    """
    assert run_python(code).split() == ["False", "True", "True"]


@pytest.mark.parametrize("missing", [None, "triton", "gcc", "Python.h"])
def test_what_torch_needs_to_compile(missing, monkeypatch, tmp_path):
    """Python's headers are not part of every Python, nor is a compiler of every machine."""
    present = {"triton", "gcc", "Python.h"} - {missing}
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in present else None)
    monkeypatch.setattr("shutil.which", lambda name: name if name in present else None)
    headers = tmp_path if "Python.h" in present else tmp_path / "none"
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(headers)})
    assert compiler_stand_ins.can_compile() is (missing is None)
    monkeypatch.setenv("CC", " ")
    assert compiler_stand_ins.can_compile() is (missing is None)
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    assert not compiler_stand_ins.can_compile()


@ON_CPU
def test_enable_too_late_is_an_error():
    code = """
        import sys, types
        from nemo_ee.runtime import stand_ins
        sys.modules["megatron.core"] = types.ModuleType("megatron.core")
        try:
            stand_ins.enable()
        except RuntimeError as error:
            print(error)
    """
    assert "megatron.core imported before" in run_python(code)


def test_torch_starts_no_compiler_processes_unless_told_to():
    code = """
        import os
        from nemo_ee.runtime import stand_ins
        os.environ.pop("TORCH_WARM_POOL", None)
        os.environ["NVIDIA_PYTORCH_VERSION"] = "25.05"
        stand_ins.enable()
        print(os.environ["TORCH_WARM_POOL"], os.environ["NVIDIA_PYTORCH_VERSION"])
    """
    assert run_python(code).split() == ["0", "25.05"]


def test_importing_the_runtime_changes_nothing():
    code = """
        import os, sys
        finders, environment = list(sys.meta_path), dict(os.environ)
        from nemo_ee.runtime import stand_ins
        print(finders == sys.meta_path, environment == os.environ, "torch" in sys.modules, stand_ins.supplied())
    """
    assert run_python(code).split() == ["True", "True", "False", "[]"]
