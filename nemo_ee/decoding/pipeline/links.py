# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which messages a stage of a pipeline that decodes sends to which, and when it runs what has come."""

import torch
from megatron.core import parallel_state

from nemo_ee.decoding.pipeline.channel import QUEUE, PipelineGroups, Receiver, Sender, StageMessage
from nemo_ee.decoding.pipeline.stage import ChosenToken

MERGED = 16
"""Messages that a stage runs in one pass at most."""
OPEN, CLOSE, TOKENS, FAILED = "open", "close", "tokens", "failed"


class StageLinks:
    """This rank's channels: forward to the next stage, and answers from all stages to the first.

    Hidden states are whole on every tensor-parallel rank, so each sends its own to the rank beside it on the
    next stage. Answers, and when to run what has come, are the first tensor-parallel rank's alone; it tells
    the others, as arrival times differ.

    Args:
        groups: of the pipeline.
    """

    def __init__(self, groups: PipelineGroups):
        ranks, along, back = groups.ranks, groups.along, groups.back
        place = parallel_state.get_pipeline_model_parallel_rank()
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.world = parallel_state.get_tensor_model_parallel_world_size()
        self.leads = parallel_state.get_tensor_model_parallel_rank() == 0
        last = place == len(ranks) - 1
        self.forward = None if last else Sender(ranks[place + 1], along)
        self._inbox = None if place == 0 else Receiver([ranks[place - 1]], along, QUEUE)
        self._to_first = Sender(ranks[0], back) if self.leads and place > 0 else None
        self._answers = Receiver(ranks[1:], back, 0) if self.leads and place == 0 else None
        self._held: StageMessage | None = None

    def answers(self, patience: float) -> list[ChosenToken]:
        """On the first stage: what exits behind it have chosen since the last call.

        Args:
            patience: seconds to wait for one; may be infinite.

        Raises:
            RuntimeError: a stage has failed.
        """
        found: list[ChosenToken] | str = []
        if self._answers is not None:
            message = self._answers.get_within(patience)
            while message is not None:
                if isinstance(message.content, tuple):
                    found = message.content[1]
                    break
                found += message.content
                message = self._answers.get_if_any()
        found = self._told(found)
        if isinstance(found, str):
            raise RuntimeError(f"a stage of the decoding pipeline failed:\n{found}")
        return found

    def answer(self, answers: list[ChosenToken]) -> None:
        """Behind the first stage: tells it what was chosen."""
        if answers and self._to_first is not None:
            self._to_first.send(answers)

    def next_messages(self) -> list[StageMessage] | None:
        """Behind the first stage: the next message, or several of tokens to be run in one pass; None at the end."""
        inbox = self._inbox
        assert inbox is not None, "nothing is sent to the first stage but answers"
        first = inbox.get() if self._held is None else self._held
        self._held = None
        if first.content is None:
            return None
        messages = [first]
        if first.content[0] != TOKENS:
            return messages
        wanted = 1
        if self.leads:
            while wanted < MERGED and self._held is None:
                message = inbox.get_if_any()
                if message is None:
                    break
                if message.content is None or message.content[0] != TOKENS:
                    self._held = message
                else:
                    messages.append(message)
                    wanted += 1
        wanted = self._told(wanted)
        while len(messages) < wanted:
            messages.append(inbox.get())
        return messages

    def end(self) -> None:
        """Says that nothing more comes, and waits until all is received."""
        for sender, last in ((self.forward, None), (self._to_first, Receiver.LAST)):
            if sender is not None:
                sender.send(last)
                if last is None:
                    sender.send(Receiver.LAST)
                sender.flush()
        for receiver in (self._inbox, self._answers):
            if receiver is not None:
                receiver.join()

    def fail(self, error: str) -> None:
        """Tells the first stage that this one cannot go on; that one then ends the session."""
        if self._to_first is not None:
            self._to_first.send((FAILED, error))

    def skip_to_end(self) -> None:
        """Behind the first stage: drops what comes until the session ends."""
        inbox = self._inbox
        assert inbox is not None, "nothing is sent to the first stage but answers"
        message = inbox.get() if self._held is None else self._held
        while message.content is not None:
            message = inbox.get()

    def _told(self, value):
        """The first tensor-parallel rank's value. Collectives: a broadcast where TP > 1."""
        if self.world == 1:
            return value
        box = [value]
        source = parallel_state.get_tensor_model_parallel_src_rank()
        torch.distributed.broadcast_object_list(box, source, group=self.group)
        return box[0]
