# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The tape is as strict as a CUDA graph: else equal results on it would show nothing."""

import pytest
import torch

from tests.support.tape import Tape, TapeCapture


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x + torch.tensor([1.0]),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: 1 if x[0] > 0 else 2,
        lambda x: x.repeat_interleave(x.long()),
    ],
)
def test_the_tape_refuses_what_a_graph_cannot_record(wait):
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), Tape():
        wait(torch.ones(3))


def test_the_tape_refuses_memory_that_is_gone_or_of_another_capture():
    capture, x, kept = TapeCapture(), torch.ones(3), []

    def passing():
        kept.append(x * 2)
        return (kept[0] + x,)

    def reading():
        return (passing_result + x,)

    passing_result = capture(lambda: (x + 1,)).outputs[0]
    with pytest.raises(RuntimeError, match="another capture has made"):
        capture(reading)
    fine = capture(passing)  # reads what its first, unrecorded call has made, and that is kept
    fine.replay()
    assert fine.outputs[0].tolist() == [3.0] * 3
    kept.clear()
    gone = capture(passing)
    kept.clear()
    with pytest.raises(RuntimeError, match="memory that is gone"):
        gone.replay()
