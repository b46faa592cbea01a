# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Messages between the stages of a pipeline that decodes: hidden states forward, chosen tokens back to the first.

Messages travel through gloo from host memory, whatever device computes: their sizes vary, a receiver need not
know them, and a few tokens' hidden states are small. A thread receives, so that a stage works while messages
arrive; when it falls behind by `QUEUE` hidden states its neighbour waits. Nobody waits for the first stage to take
answers: it may itself be waiting for a stage behind.
"""

import math
import pickle
import queue
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_ee.runtime.collective import gather

QUEUE = 32
"""Hidden states that wait at a stage at most."""
UNSENT = 8
"""Messages that a stage sends ahead at most."""


@dataclass(frozen=True)
class PipelineGroups:
    """The gloo groups of this rank's pipeline, for messages only.

    Attributes:
        ranks: global, of its stages in their order.
        along: for hidden states.
        back: for answers.
    """

    ranks: list[int]
    along: ProcessGroup
    back: ProcessGroup

    @classmethod
    def make(cls) -> "PipelineGroups":
        """Collective over all ranks of the job; once is enough."""
        mine = torch.distributed.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
        made = {
            tuple(ranks): [torch.distributed.new_group(ranks, backend="gloo") for _ in range(2)]
            for ranks in sorted({tuple(ranks) for ranks in gather(mine)})
        }
        return cls(mine, *made[tuple(mine)])


@dataclass(frozen=True)
class StageMessage:
    """What one stage tells another.

    Attributes:
        content: anything that pickles.
        hidden: [T, H] on the host, or None.
    """

    content: Any
    hidden: Tensor | None = None


class StageGone(RuntimeError):
    """A stage of the pipeline does not answer any more."""


class Sender:
    """Sends messages to one rank, in order.

    Args:
        rank: global.
        group: of gloo, used for nothing else.
    """

    def __init__(self, rank: int, group: ProcessGroup):
        self.rank, self.group = rank, group
        self._unsent: deque[list[Any]] = deque()

    def send(self, content: Any, hidden: Tensor | None = None) -> None:
        """Sends; waits only while `UNSENT` messages are on their way.

        Args:
            content: anything that pickles.
            hidden: [T, H] on any device.

        Raises:
            StageGone: the peer is gone.
        """
        shape = None if hidden is None else (tuple(hidden.shape), hidden.dtype)
        packed = pickle.dumps((content, shape))
        parts = [torch.from_numpy(np.frombuffer(packed, dtype=np.uint8).copy())]
        if hidden is not None:
            parts.append(hidden.detach().cpu().contiguous().view(torch.uint8).flatten())
        body = torch.cat(parts)
        header = torch.tensor([len(packed), len(body)])
        works = [torch.distributed.isend(x, self.rank, group=self.group) for x in (header, body)]
        self._unsent.append([works, header, body])  # buffers must outlive their sending
        while len(self._unsent) > UNSENT:
            self._wait_for_oldest()

    def flush(self) -> None:
        """Waits until all messages are received."""
        while self._unsent:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        for work in self._unsent.popleft()[0]:
            try:
                work.wait()
            except RuntimeError as error:
                raise StageGone("a stage of the decoding pipeline is gone") from error


class Receiver:
    """Receives messages from several ranks in a thread of its own, until one says that it is the last.

    Args:
        ranks: global; messages of one rank come in its order.
        group: of gloo, used for nothing else.
        most: messages that may wait here; 0 sets no limit.
    """

    LAST = "last"

    def __init__(self, ranks: list[int], group: ProcessGroup, most: int):
        self._arrived: queue.Queue[StageMessage | BaseException] = queue.Queue(most)
        self._threads = [
            threading.Thread(target=self._listen, args=(rank, group), daemon=True) for rank in ranks
        ]
        for thread in self._threads:
            thread.start()

    def _listen(self, rank: int, group: ProcessGroup) -> None:
        try:
            while True:
                header = torch.empty(2, dtype=torch.long)
                torch.distributed.recv(header, rank, group=group)
                packed, total = header.tolist()
                body = torch.empty(total, dtype=torch.uint8)
                torch.distributed.recv(body, rank, group=group)
                content, shape = pickle.loads(body[:packed].numpy().tobytes())
                hidden = None
                if shape is not None:
                    hidden = body[packed:].clone().view(shape[1]).view(shape[0])
                if content == self.LAST:
                    return
                self._arrived.put(StageMessage(content, hidden))
        except BaseException as error:  # a peer is gone; whoever waits must know
            self._arrived.put(error)

    def get(self) -> StageMessage:
        """The next message; waits for it.

        Raises:
            StageGone: a peer is gone.
        """
        return self._checked(self._arrived.get())

    def get_within(self, seconds: float) -> StageMessage | None:
        """The next message, if there is one or one comes within this time."""
        try:
            return self._checked(self._arrived.get(timeout=None if seconds == math.inf else seconds))
        except queue.Empty:
            return None

    def get_if_any(self) -> StageMessage | None:
        """The next message, if there is one."""
        return self.get_within(0.0)

    def join(self) -> None:
        """Waits until every rank has said its last."""
        for thread in self._threads:
            thread.join()

    @staticmethod
    def _checked(item: StageMessage | BaseException) -> StageMessage:
        if isinstance(item, BaseException):
            raise StageGone("a stage of the decoding pipeline is gone") from item
        return item
