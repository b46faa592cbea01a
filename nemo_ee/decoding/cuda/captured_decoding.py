# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What a model keeps for decoding with CUDA graphs: caches of a fixed size, and graphs that hold their addresses.

One decoder borrows them at a time. Another one that runs meanwhile (a thread's, or one made while the first is
alive), and one that needs more rows or positions, gets caches of its own and decodes eagerly, to the same tokens.
So memory is what was asked for at the start, however calls differ, and nothing is captured twice.
"""

from collections.abc import Sequence

import torch
from tqdm import tqdm

from nemo_ee.decoding.cuda.cuda_capture import Capture
from nemo_ee.decoding.cuda.segment_graphs import CapturedPasses, EagerPasses, capture_for, warn_of_eager
from nemo_ee.decoding.cuda.static_tokens import static_positions
from nemo_ee.decoding.decoding_memory import DecodingMemory
from nemo_ee.decoding.decoding_model import DecodingModel

QUIET_SECONDS = 2.0
"""Capturing all shapes shows a progress bar if it takes longer."""


class CapturedDecoding:
    """Caches and captured passes of one model, lent to one decoder at a time.

    Args:
        model: the whole model; it keeps this, not the other way round, so that letting it go frees all memory.
        capture: see `nemo_ee.decoding.cuda.segment_graphs.capture_for`.
        rows: sequences of a decoder, at most.
        max_length: positions of a sequence, at most.

    Raises:
        torch.OutOfMemoryError: the caches do not fit.

    Attributes:
        passes: on the caches.
    """

    def __init__(self, model: DecodingModel, capture: Capture, rows: int, max_length: int):
        self.rows, self.max_length = rows, max_length
        # Ordinary tensors: decoders change them under inference_mode and under no_grad.
        with torch.inference_mode(False), torch.no_grad():
            memory = DecodingMemory(model, sorted(model.heads), rows, static_positions(max_length))
        self.passes = CapturedPasses(capture, memory)
        assert model.output is not None, "the whole model"
        self._heads, self._output, self._hidden = model.heads, model.output, model.hidden

    def borrow(self, rows: int, max_length: int) -> CapturedPasses | None:
        """The passes, on empty caches, until their `give_back`.

        Returns:
            None if they are too small, or lent.
        """
        if rows > self.rows or max_length > self.max_length:
            warn_of_eager(
                f"{rows} sequences of {max_length} positions are more than the {self.rows} of {self.max_length} "
                "that are prepared",
                f"prepare_decoding(rows={max(rows, self.rows)}, max_length={max(max_length, self.max_length)})",
            )
            return None
        if not self.passes.lend():
            warn_of_eager("another decoder uses them", "they serve one at a time")
            return None
        return self.passes

    def capture_all(self) -> None:
        """Captures all that `nemo_ee.decoding.decoder` may replay, but for `state_copy`: so no request waits for it.

        Call it as passes are run: under `generating`, in the thread that decodes.
        """
        work = list(self.passes.all_shapes(self._heads, self._output, self._hidden))
        for capture in tqdm(work, "capturing CUDA graphs", delay=QUIET_SECONDS, leave=False):
            capture()


def captured_decoding(model: DecodingModel, rows: int, max_length: int) -> CapturedDecoding | None:
    """What the model's decoders may borrow; None, on a GPU after a warning, where nothing can be captured.

    Args:
        model: what `generating` decodes with.
        rows: see `CapturedDecoding`.
        max_length: see `CapturedDecoding`.
    """
    capture = capture_for(model)
    if capture is None:
        return None
    try:
        return CapturedDecoding(model, capture, rows, max_length)
    except torch.OutOfMemoryError as error:
        warn_of_eager(
            f"caches for {rows} sequences of {max_length} positions do not fit ({error})",
            "prepare_decoding(rows=…, max_length=…) with less",
        )
        return None


def passes_for(model: DecodingModel, exit_layers: Sequence[int], rows: int, max_length: int) -> EagerPasses:
    """The model's captured passes if it has them to lend, else eager ones on a memory of their own.

    Args:
        model: the whole model.
        exit_layers: that it uses, ascending.
        rows: sequences that it needs.
        max_length: positions that it needs.
    """
    lent = None if model.captured is None else model.captured.borrow(rows, max_length)
    return lent or EagerPasses(DecodingMemory(model, exit_layers, rows, max_length))
