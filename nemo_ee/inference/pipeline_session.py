# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Decoding on several pipeline stages: a token's successor starts as soon as an exit of any stage has chosen it.

Every token runs through all stages, one behind the other. The stage whose exit is sure sends the next token to
the first stage at once and the hidden states on to the next stage, which fills its part of the KV cache while
the first already works on. So a token takes the time to its exit's stage, nothing has to be caught up, and the
tokens are those of one process. What waits at a stage is run in one pass. (EE-LLM, arXiv:2312.04916, section
4.2, has the idea; it decides for a batch as a whole and does not stop at EOS.)
"""

import itertools
from collections.abc import Sequence as Several
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from nemo_ee.inference.pipeline_channel import Message, Receiver, Sender
from nemo_ee.inference.pipeline_stage import Answer, Stage, Tokens, merge
from nemo_ee.inference.sequence import Sequence
from nemo_ee.megatron.decoding_model import DecodingModel

MERGED = 16
"""Messages that a stage runs in one pass at most."""
OPEN, CLOSE, TOKENS, FAILED = "open", "close", "tokens", "failed"


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
        every: list[list[int]] = [[]] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(every, mine)
        made = {
            tuple(ranks): [torch.distributed.new_group(ranks, backend="gloo") for _ in range(2)]
            for ranks in sorted({tuple(ranks) for ranks in every})
        }
        return cls(mine, *made[tuple(mine)])


class PipelineSession:
    """`DecodingSession`'s counterpart on the first stage; every other stage calls `serve`.

    A sequence goes on as soon as its token is known, whatever its neighbours wait for. Call `end` at last, so
    that the other stages return.

    Args:
        groups: of the pipeline.
        model: of this stage.
        exit_layers: exits that any sequence may use, ascending, of all stages.
        slots: sequences at a time.
        max_length: positions per sequence.
        confidence: see `EarlyExitDecoder`; a rule that does not look back.

    Attributes:
        running: the sequences.
    """

    def __init__(
        self,
        groups: PipelineGroups,
        model: DecodingModel,
        exit_layers: Several[int],
        slots: int,
        max_length: int,
        confidence: str,
    ):
        self.slots, self.max_length = slots, max_length
        self.running: list[Sequence] = []
        self._stage = Stage(model, list(exit_layers), slots, max_length, confidence)
        self._links = _Links(groups)
        self._names = itertools.count()
        self._keys: dict[Sequence, int] = {}
        self._ready: list[Sequence] = []

    @property
    def free(self) -> int:
        """Sequences that can be added."""
        return self.slots - len(self.running)

    def add(self, sequences: Several[Sequence]) -> list[Sequence]:
        """Feeds prompts; their first tokens come with later steps. Returns those that are finished: none."""
        assert len(sequences) <= self.free, "no free slot"
        for sequence in sequences:
            key = self._keys[sequence] = next(self._names)
            self._stage.open(key, sequence)
            self._links.forward.send((OPEN, key, sequence.twin()))
            self.running.append(sequence)
        keys, count = [self._keys[s] for s in sequences], len(sequences)
        prompts = [list(s.prompt) for s in sequences]
        self._feed(Tokens(keys, [0] * count, prompts, [True] * count, [False] * count))
        return []

    def step(self) -> list[Sequence]:
        """Feeds what is ready, waits for a token if nothing is, and returns sequences that are finished."""
        if self._ready:
            going, self._ready = self._ready, []
            keys, count = [self._keys[s] for s in going], len(going)
            starts = [len(s.prompt) + len(s.tokens) - 1 for s in going]
            self._feed(Tokens(keys, starts, [[s.tokens[-1]] for s in going], [True] * count, [True] * count))
        else:
            self._take(self._links.answers(wait=bool(self.running)))
        return self._retire()

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence before its time."""
        sequence.finish_reason = "cancelled"
        self._retire()

    def end(self) -> None:
        """Lets the other stages return. Collective over the pipeline."""
        self._links.end()

    def _feed(self, tokens: Tokens) -> None:
        hidden, answers = self._stage.run(tokens, None)
        self._links.forward.send((TOKENS, tokens), hidden)
        self._take(answers)
        self._take(self._links.answers(wait=False))

    def _take(self, answers: list[Answer]) -> None:
        sequences = {key: sequence for sequence, key in self._keys.items()}
        for answer in answers:
            sequence = sequences.get(answer.key)  # one that was removed has none
            if sequence is not None and sequence.finish_reason is None:
                if sequence.commit(answer.token, answer.exit_layer, answer.confidence):
                    self._ready.append(sequence)

    def _retire(self) -> list[Sequence]:
        finished = [s for s in self.running if s.finish_reason is not None]
        for sequence in finished:
            key = self._keys.pop(sequence)
            self._stage.close(key)
            self._links.forward.send((CLOSE, key))
        self.running = [s for s in self.running if s.finish_reason is None]
        self._ready = [s for s in self._ready if s.finish_reason is None]
        return finished


def serve(
    groups: PipelineGroups,
    model: DecodingModel,
    exit_layers: Several[int],
    slots: int,
    max_length: int,
    confidence: str,
) -> None:
    """A stage behind the first: runs what comes until the session on the first ends.

    Args:
        groups: of the pipeline.
        model: of this stage.
        exit_layers: as for `PipelineSession`.
        slots: likewise.
        max_length: likewise.
        confidence: likewise.
    """
    stage, links = Stage(model, list(exit_layers), slots, max_length, confidence), _Links(groups)
    try:
        while (messages := links.next_messages()) is not None:
            kind, *content = messages[0].content
            if kind == OPEN:
                stage.open(*content)
            elif kind == CLOSE:
                stage.close(*content)
            else:
                tokens, hidden = merge([(message.content[1], message.hidden) for message in messages])
                hidden, answers = stage.run(tokens, hidden)
                links.answer(answers)
                if links.forward is not None:
                    links.forward.send((TOKENS, tokens), hidden)
                continue
            if links.forward is not None:
                links.forward.send(messages[0].content)
    except BaseException as error:
        links.fail(error)
        raise
    links.end()


class _Links:
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
        self._inbox = None if place == 0 else Receiver([ranks[place - 1]], along)
        self._to_first = Sender(ranks[0], back) if self.leads and place > 0 else None
        self._answers = Receiver(ranks[1:], back) if self.leads and place == 0 else None
        self._held: Message | None = None

    def answers(self, wait: bool) -> list[Answer]:
        """On the first stage: what exits behind it have chosen since the last call.

        Args:
            wait: for one at least.

        Raises:
            RuntimeError: a stage has failed.
        """
        found: list[Answer] | str = []
        if self._answers is not None:
            message = self._answers.get() if wait else self._answers.get_if_any()
            while message is not None:
                if isinstance(message.content, tuple):
                    found = message.content[1]
                    break
                found += message.content
                message = self._answers.get_if_any()
        found = self._told(found)
        if isinstance(found, str):
            raise RuntimeError(f"a stage of the decoding pipeline failed: {found}")
        return found

    def answer(self, answers: list[Answer]) -> None:
        """Behind the first stage: tells it what was chosen."""
        if answers and self._to_first is not None:
            self._to_first.send(answers)

    def next_messages(self) -> list[Message] | None:
        """Behind the first stage: the next message, or several of tokens to be run in one pass; None at the end."""
        first = self._inbox.get() if self._held is None else self._held
        self._held = None
        if first.content is None:
            return None
        messages = [first]
        if first.content[0] != TOKENS:
            return messages
        wanted = 1
        if self.leads:
            while wanted < MERGED and self._held is None:
                message = self._inbox.get_if_any()
                if message is None:
                    break
                if message.content is None or message.content[0] != TOKENS:
                    self._held = message
                else:
                    messages.append(message)
                    wanted += 1
        wanted = self._told(wanted)
        while len(messages) < wanted:
            messages.append(self._inbox.get())
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

    def fail(self, error: BaseException) -> None:
        """Tells the first stage that this one cannot go on."""
        if self._to_first is not None:
            self._to_first.send((FAILED, f"{type(error).__name__}: {error}"))

    def _told(self, value):
        """The first tensor-parallel rank's value. Collectives: a broadcast where TP > 1."""
        if self.world == 1:
            return value
        box = [value]
        source = parallel_state.get_tensor_model_parallel_src_rank()
        torch.distributed.broadcast_object_list(box, source, group=self.group)
        return box[0]
