# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Decoding on several pipeline stages: a token's successor starts as soon as an exit of any stage has chosen it.

Every token runs through all stages, one behind the other. The stage whose exit is sure sends the next token to
the first stage at once and the hidden states on to the next stage, which fills its part of the KV cache while
the first already works on. So a token takes the time to its exit's stage, nothing has to be caught up, and the
tokens are those of one process. What waits at a stage is run in one pass. (EE-LLM, arXiv:2312.04916, section
4.2, has the idea; it decides for a batch as a whole and does not stop at EOS.)
"""

import itertools
import math
import time
import traceback
from collections.abc import Sequence

from torch import Tensor

from nemo_ee.decoding.decoding_model import DecodingModel
from nemo_ee.decoding.generated_sequence import GeneratedSequence
from nemo_ee.decoding.pipeline.channel import PipelineGroups, StageGone, StageMessage
from nemo_ee.decoding.pipeline.links import CLOSE, OPEN, TOKENS, StageLinks
from nemo_ee.decoding.pipeline.stage import ChosenToken, Stage, TokenBatch, merge

PATIENCE = 0.1
"""Share of the last pass that the first stage waits with what it could feed for answers of other sequences. Where
stages take about as long, an answer comes just when the next pass would begin, and would then wait for its end."""


class PipelineSession:
    """`DecodingSession`'s counterpart on the first stage; every other stage calls `serve`.

    A sequence goes on as soon as its token is known, whatever its neighbours wait for. Use it in a `with`
    statement, or call `end` at last, so that the other stages return.

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
        exit_layers: Sequence[int],
        slots: int,
        max_length: int,
        confidence: str,
    ):
        self.slots, self.max_length = slots, max_length
        self.running: list[GeneratedSequence] = []
        self._links = StageLinks(groups)
        assert self._links.forward is not None, "a pipeline has several stages"
        self._forward = self._links.forward
        try:
            self._stage = Stage(model, list(exit_layers), slots, max_length, confidence)
        except Exception:
            self._links.end()
            raise
        self._final_layer = model.final_layer
        self._names = itertools.count()
        self._keys: dict[GeneratedSequence, int] = {}
        self._ready: list[GeneratedSequence] = []
        self._pass_seconds = 0.0

    def __enter__(self) -> "PipelineSession":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        if kind is None or not issubclass(kind, StageGone):  # then there is nobody to tell
            self.end()

    @property
    def free(self) -> int:
        """Sequences that can be added."""
        return self.slots - len(self.running)

    def add(self, sequences: Sequence[GeneratedSequence]) -> list[GeneratedSequence]:
        """Feeds prompts; their first tokens come with later steps. Returns those that are finished: none."""
        assert len(sequences) <= self.free, "no free slot"
        for sequence in sequences:
            key = self._keys[sequence] = next(self._names)
            self._stage.open(key, sequence)
            self._forward.send((OPEN, key, sequence.twin()))
            self.running.append(sequence)
        keys, count = [self._keys[s] for s in sequences], len(sequences)
        prompts = [list(s.prompt) for s in sequences]
        self._feed(TokenBatch(keys, [0] * count, prompts, [True] * count, [False] * count))
        return []

    def step(self) -> list[GeneratedSequence]:
        """Feeds what is ready, waits for a token if nothing is, and returns sequences that are finished."""
        if self._ready and len(self._ready) < len(self.running):
            self._take(self._links.answers(PATIENCE * self._pass_seconds))
        if self._ready:
            going, self._ready = self._ready, []
            keys, count = [self._keys[s] for s in going], len(going)
            starts = [len(s.prompt) + len(s.tokens) - 1 for s in going]
            self._feed(
                TokenBatch(keys, starts, [[s.tokens[-1]] for s in going], [True] * count, [True] * count)
            )
        else:
            self._take(self._links.answers(math.inf if self.running else 0.0))
        return self._retire()

    def remove(self, sequence: GeneratedSequence) -> None:
        """Ends a sequence before its time."""
        sequence.finish_reason = "cancelled"
        self._retire()

    def end(self) -> None:
        """Lets the other stages return. Collective over the pipeline.

        Raises:
            RuntimeError: a stage has failed.
        """
        self._links.end()
        self._links.answers(0.0)

    def _feed(self, tokens: TokenBatch) -> None:
        begin = time.perf_counter()
        hidden, answers = self._stage.run(tokens, None)
        self._pass_seconds = time.perf_counter() - begin
        self._forward.send((TOKENS, tokens), hidden)
        self._take(answers)
        self._take(self._links.answers(0.0))

    def _take(self, answers: list[ChosenToken]) -> None:
        sequences = {key: sequence for sequence, key in self._keys.items()}
        for answer in answers:
            sequence = sequences.get(answer.key)  # one that was removed has none
            if sequence is not None and sequence.finish_reason is None:
                if answer.give(sequence):
                    self._ready.append(sequence)

    def _retire(self) -> list[GeneratedSequence]:
        finished = [s for s in self.running if s.finish_reason is not None]
        for sequence in finished:
            fed = len(sequence.prompt) + max(len(sequence.tokens) - 1, 0)
            sequence.statistics.layers_run = fed * self._final_layer
            key = self._keys.pop(sequence)
            self._stage.close(key)
            self._forward.send((CLOSE, key))
        self.running = [s for s in self.running if s.finish_reason is None]
        self._ready = [s for s in self._ready if s.finish_reason is None]
        return finished


def serve(
    groups: PipelineGroups,
    model: DecodingModel,
    exit_layers: Sequence[int],
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
    links = StageLinks(groups)
    try:
        stage = Stage(model, list(exit_layers), slots, max_length, confidence)
        while (messages := links.next_messages()) is not None:
            kind, *content = messages[0].content
            if kind == OPEN:
                stage.open(*content)
            elif kind == CLOSE:
                stage.close(*content)
            else:
                tokens, hidden = merge([_tokens_of(message) for message in messages])
                hidden, answers = stage.run(tokens, hidden)
                links.answer(answers)
                if links.forward is not None:
                    links.forward.send((TOKENS, tokens), hidden)
                continue
            if links.forward is not None:
                links.forward.send(messages[0].content)
    except StageGone:
        raise  # there is nobody to tell
    except Exception:
        links.fail(traceback.format_exc())
        links.skip_to_end()
        links.end()
        raise
    links.end()


def _tokens_of(message: StageMessage) -> tuple[TokenBatch, Tensor]:
    """New tokens and the hidden states [T, H] that come with them."""
    assert message.hidden is not None, "tokens come with their hidden states"
    return message.content[1], message.hidden
