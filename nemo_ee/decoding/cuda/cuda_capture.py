# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Functions of fixed tensors as CUDA graphs: recorded once, then launched as a whole."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PassFunction = Callable[[], tuple[Tensor, ...]]
"""Reads tensors that stay where they are, changes caches in place, and returns new tensors."""


@dataclass(frozen=True)
class CapturedPass:
    """A pass that can be repeated.

    Attributes:
        replay: does what the pass did, with what its tensors hold now.
        outputs: where results are after a replay, until another pass is replayed or captured.
    """

    replay: Callable[[], None]
    outputs: tuple[Tensor, ...]


Capture = Callable[[PassFunction], CapturedPass]
"""Calls a pass, more than once perhaps, and keeps what it does. Raises RuntimeError where it cannot."""


class CudaCapture:
    """Captures passes as CUDA graphs that share one memory pool; they must be replayed on one stream.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: PassFunction) -> CapturedPass:
        """Calls the pass once outright, so that kernels and work spaces are chosen, and once to record it.

        Raises:
            RuntimeError: for what cannot be recorded, such as waiting for the device, or too little memory.
        """
        caller, graph = torch.cuda.current_stream(self._stream.device), torch.cuda.CUDAGraph()
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):  # a failed capture would leave its stream current
                run()
                # Errors of this thread alone: another thread may use the device meanwhile.
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    outputs = run()
        finally:
            caller.wait_stream(self._stream)
        return CapturedPass(graph.replay, outputs)
