# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Generated text as it comes: an iterator over what each decoding step adds to its sequences."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nemo_ee.decoding.generated_sequence import GeneratedSequence
from nemo_ee.decoding.logprobs import TokenLogprobs
from nemo_ee.decoding.session import DecodingSession
from nemo_ee.generation.generating import generating
from nemo_ee.generation.text_stream import TextStream


@dataclass(frozen=True)
class StreamedText:
    """What is new of one sequence.

    Attributes:
        index: of its prompt.
        text: that the new tokens add. Whole characters, and nothing of an end string: what may begin one waits.
        token_ids: the new tokens whose text is settled.
        exit_layers: of each the exit; `num_layers` for the final one.
        confidences: of that exit.
        logprobs: what it said of each, if `sampling_params.logprobs` asks for that; else empty.
        finish_reason: "stop" or "length" with the sequence's last; None before.
    """

    index: int
    text: str
    token_ids: list[int]
    exit_layers: list[int]
    confidences: list[float]
    finish_reason: str | None
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class SequenceReader:
    """Reads what a sequence's steps have settled, each token once.

    Args:
        sequence: with a `TextStream`.
        index: of its prompt.
    """

    def __init__(self, sequence: GeneratedSequence, index: int):
        assert isinstance(sequence.text, TextStream), "it streams text"
        self._sequence, self._stream, self._index = sequence, sequence.text, index
        self._read, self._ended = 0, False

    def news(self) -> StreamedText | None:
        """What is new; None for nothing."""
        sequence, start, end = self._sequence, self._read, len(self._stream.pieces)
        if self._ended or (end == start and sequence.finish_reason is None):
            return None
        self._read, self._ended = end, sequence.finish_reason is not None
        text = "".join(self._stream.pieces[start:end])
        new = slice(start, end)
        return StreamedText(
            self._index,
            text,
            sequence.tokens[new],
            sequence.exit_layers[new],
            sequence.confidences[new],
            sequence.finish_reason,
            sequence.logprobs[new],
        )


def streamed(model: Any, sequences: list[GeneratedSequence]) -> Iterator[StreamedText]:
    """Continues sequences, which decode together, step by step; the model is as it was whenever the iterator waits.

    Args:
        model: a `MegatronGPTEarlyExitModel` on one pipeline stage.
        sequences: not begun, of one request, each with a `TextStream`.
    """
    readers = [SequenceReader(sequence, i) for i, sequence in enumerate(sequences)]
    request = sequences[0].request
    session: DecodingSession | None = None
    longest = max(s.positions for s in sequences)
    try:
        if request.max_length > 0:
            with generating(model):
                decoding, size = model.decoding_model(), (len(sequences), longest)
                session = DecodingSession(
                    decoding, request.asked, *size, request.kv_policy, request.confidence
                )
                session.add(sequences)
        yield from _news(readers)
        while session is not None and session.running:
            with generating(model):
                session.step()
            yield from _news(readers)
    finally:
        if session is not None:
            session.__exit__()


def _news(readers: list[SequenceReader]) -> Iterator[StreamedText]:
    return (news for reader in readers if (news := reader.news()) is not None)
