# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""`torch.cuda`, with one queue of work: the program itself."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.cuda.nccl
from torch import Tensor

from tests.support.pretend_gpu import waits
from tests.support.pretend_gpu.tensor import CudaTensor, current_index, use_device

NAME = "pretend GPU"
MEMORY = 80 << 30
TYPES = [f"{kind}Tensor" for kind in "BFloat16 Bool Byte Char Double Float Half Int Long Short".split()]


class Stream:
    """A queue; there is one."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cuda", current_index())

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """The device waits, not the program."""

    def wait_event(self, event: Any) -> None:
        """The same."""

    def record_event(self, event: Any = None) -> "Event":
        """Makes an event."""
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        """The program waits."""
        waits.record("synchronize")

    def query(self) -> bool:
        """All is done at once here."""
        return True


class Event:
    """A moment; its times are the host's."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        """Now."""
        self.at = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """The device waits."""

    def synchronize(self) -> None:
        """The program waits."""
        waits.record("synchronize")

    def query(self) -> bool:
        """All is done at once here."""
        return True

    def elapsed_time(self, other: "Event") -> float:
        """Milliseconds."""
        return (other.at - self.at) * 1e3


class CUDAGraph:
    """A graph that records operations on a tape and repeats them; a wait while it records is an error."""

    replays = 0
    """Of all graphs of this process."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.reset()

    def capture_begin(self, *_: Any, **__: Any) -> None:
        """Records from now on."""
        waits.begin_capture()
        self.tape.__enter__()

    def capture_end(self) -> None:
        """No longer."""
        self.tape.__exit__(None, None, None)
        waits.end_capture()

    def replay(self) -> None:
        """Repeats what was recorded."""
        CUDAGraph.replays += 1
        self.tape.replay()

    def reset(self) -> None:
        """Forgets it."""
        from tests.support.tape import Tape  # which imports the package

        self.tape = Tape()

    def pool(self) -> tuple[int, int]:
        """Of memory."""
        return 0, 0


class graph:  # noqa: N801  (torch's name)
    """`torch.cuda.graph`."""

    def __init__(self, cuda_graph: CUDAGraph, *_: Any, **__: Any) -> None:
        self.cuda_graph = cuda_graph

    def __enter__(self) -> None:
        self.cuda_graph.capture_begin()

    def __exit__(self, *_: Any) -> None:
        self.cuda_graph.capture_end()


class _Context:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> "_Context":
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class _TensorType(type):
    """`torch.cuda.FloatTensor` and the others: a constructor and an `isinstance` test."""

    dtype: torch.dtype

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, CudaTensor) and instance.dtype == cls.dtype

    def __call__(cls, *args: Any) -> Tensor:
        if args and isinstance(args[0], int):
            return torch.empty(*args, dtype=cls.dtype, device="cuda")
        return torch.tensor(*(args or ([],)), dtype=cls.dtype, device="cuda")


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _own(function: Callable) -> Callable:
    """Another function: dynamo, which Lightning imports, wants every name of torch to have its own."""
    return lambda *args, **kwargs: function(*args, **kwargs)


def _synchronize(*_: Any) -> None:
    waits.record("synchronize")


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _set_state(state: Tensor, *_: Any, **__: Any) -> None:
    if isinstance(state, CudaTensor):
        raise TypeError("expected a torch.ByteTensor, but got torch.cuda.ByteTensor")
    torch.default_generator.set_state(state)


def patch(devices: int) -> None:
    """Changes `torch.cuda` in this process.

    Args:
        devices: how many GPUs there are; every process may use one.
    """
    cuda: Any = torch.cuda
    cuda.is_available, cuda.is_initialized = lambda: True, lambda: True
    cuda.device_count = lambda: devices
    cuda.current_device = _own(current_index)

    def set_device(device: Any) -> None:
        index = device if isinstance(device, int) else torch.device(device).index
        if not 0 <= (index or 0) < devices:
            raise RuntimeError("CUDA error: invalid device ordinal")
        use_device(index or 0)

    cuda.set_device = set_device
    cuda.synchronize = _synchronize
    for name in "empty_cache init _lazy_init ipc_collect set_stream reset_peak_memory_stats".split():
        setattr(cuda, name, _own(_nothing))
    cuda._lazy_call = lambda function, **_: function()
    cuda.Stream, cuda.Event, cuda.CUDAGraph, cuda.graph = Stream, Event, CUDAGraph, graph
    cuda.stream = cuda.device = _Context
    cuda.current_stream, cuda.default_stream = lambda *_: Stream(), lambda *_: Stream()
    cuda.graph_pool_handle = lambda: (0, 0)
    cuda.is_current_stream_capturing = _own(waits.is_capturing)
    cuda.get_device_properties = lambda *_: SimpleNamespace(
        name=NAME, total_memory=MEMORY, major=9, minor=0, multi_processor_count=132, warp_size=32
    )
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_name = lambda *_: NAME
    cuda.is_bf16_supported = lambda *_, **__: True
    for name in "memory_allocated max_memory_allocated memory_reserved max_memory_reserved".split():
        setattr(cuda, name, lambda *_, **__: 0)
    cuda.memory_stats = lambda *_: {}
    cuda.mem_get_info = lambda *_: (MEMORY, MEMORY)
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _own(_nothing), _own(_nothing)
    cuda.cudart = lambda: SimpleNamespace(cudaProfilerStart=_nothing, cudaProfilerStop=_nothing)
    cuda.nccl.version = lambda *_: (2, 27, 5)
    # Both devices draw from one generator, so that draws on the device are those of a run on the CPU.
    cuda.default_generators = (torch.default_generator,) * devices
    generator = torch.default_generator
    random = dict(
        manual_seed=_seed,
        manual_seed_all=_seed,
        seed=generator.seed,
        seed_all=generator.seed,
        initial_seed=generator.initial_seed,
        get_rng_state=lambda *_, **__: generator.get_state(),
        set_rng_state=_set_state,
        get_rng_state_all=lambda: [generator.get_state()],
        set_rng_state_all=lambda states: _set_state(states[0]),
    )
    for name, function in random.items():
        cuda.random.__dict__[name] = cuda.__dict__[name] = _own(function)
    for name in TYPES:
        of = dict(dtype=getattr(torch, name).dtype, type_name=f"torch.cuda.{name}")
        setattr(cuda, name, _TensorType(name, (), of))
