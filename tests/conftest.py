# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Set-up of all tests: stand-ins for what the machine lacks, the marks, and the ``workers`` fixture."""

import os
from collections import Counter

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from nemo_ee.runtime import stand_ins  # noqa: E402
from tests.support import distributed  # noqa: E402
from tests.support.pretend_gpu import pool  # noqa: E402

stand_ins.enable()


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_configure(config):
    if (
        config.option.markexpr == "gpu" and not torch.cuda.is_available()
    ):  # all would be skipped, and all seem well
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        setting = "unset" if hidden is None else repr(hidden)
        raise pytest.UsageError(
            f"-m gpu: torch {torch.__version__} sees no GPU with CUDA_VISIBLE_DEVICES={setting}; "
            "use CUDA_VISIBLE_DEVICES=0 bash scripts/test.sh -m gpu, on a machine with one"
        )


def pytest_collection_modifyitems(config, items):
    slow = pytest.mark.skip(reason="slow; pass --slow to run it")
    gpu = pytest.mark.skip(reason="needs a GPU; CUDA_VISIBLE_DEVICES=0 bash scripts/test.sh -m gpu runs it")
    if getattr(torch.cuda, "_pretend", False):
        config.hook.pytest_deselected(items=[item for item in items if "gpu_kernels" in item.keywords])
        items[:] = [item for item in items if "gpu_kernels" not in item.keywords]
    counts = Counter(item.nodeid for item in items)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise pytest.UsageError(
            f"pytest-xdist would run one test of several of the same name: {', '.join(twice)}"
        )
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(gpu)
    if any("workers" in item.fixturenames for item in items) and not config.option.collectonly:
        distributed.start_server()  # imports NeMo on the other core while the first tests run
    if any("pretend_gpus" in item.fixturenames for item in items) and not config.option.collectonly:
        pool.start_server()


@pytest.fixture(scope="session")
def workers():
    """``workers(n).run(fn, *args)`` calls fn in n gloo ranks; see tests.support.distributed."""
    return distributed.Workers


@pytest.fixture(scope="session")
def pretend_gpus():
    """``pretend_gpus(n).run(fn, *args)`` calls fn in n ranks with pretend GPUs; see tests.support.pretend_gpu."""
    yield pool.PretendGpus
    pool.stop_server()


@pytest.fixture
def warnings_about_graphs(caplog):
    """Gives the messages so far that say why decoding runs without graphs."""
    from nemo_ee.decoding.cuda.segment_graphs import warn_of_eager

    warn_of_eager.cache_clear()
    return lambda: [r.getMessage() for r in caplog.records if "CUDA graphs" in r.getMessage()]


@pytest.fixture(autouse=True)
def _scripts_meet_at_a_port_of_their_own():
    """Trainers in this process leave the port they listen at in the environment, which scripts inherit."""
    yield
    os.environ.pop("MASTER_PORT", None)
