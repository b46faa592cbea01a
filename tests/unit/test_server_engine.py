# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The engine's thread over a fake session: who joins when, who leaves, and what happens when it fails."""

import threading
import time
from contextlib import contextmanager

import pytest

from nemo_ee.decoding.generated_sequence import GeneratedSequence
from nemo_ee.decoding.request import GenerationRequest
from nemo_ee.generation.detokenizer import UNFINISHED
from nemo_ee.generation.text_stream import TextStream
from nemo_ee.server.answers.delta import Delta
from nemo_ee.server.answers.errors import ApiError
from nemo_ee.server.engine import MAX_FAILURES, Engine
from nemo_ee.server.job import Job
from nemo_ee.server.metrics import Metrics
from nemo_ee.server.probe import PROMPT as PROBE
from tests.support.fake_session import FakeSession, confidence_of, layer_of, token_of
from tests.support.server import until

EOS = 0
OPEN = "opening the session is refused"


def decode(ids):
    return "".join(f" {token}" for token in ids)


def job(prompt, limit=5, stop=(), timeout=60.0):
    text = TextStream(decode, prompt, stop)
    sequence = GeneratedSequence(prompt, GenerationRequest(), frozenset({EOS}), (EOS,), limit, text=text)
    return Job(sequence, None, 0, time.monotonic() + timeout)


class Running:
    """An engine over a fake session, and what it has delivered per job."""

    def __init__(self, session, queue_size=100, prefill_tokens=1000, open_session=None):
        self.session, self.metrics, self.news = session, Metrics(), {}
        self.engine = Engine(
            open_session or session.opened,
            session.slots,
            prefill_tokens,
            queue_size,
            self.metrics,
            self._note,
        )

    def _note(self, events):
        for which, news in events:
            self.news.setdefault(which, []).append(news)

    def submit(self, *jobs):
        self.engine.submit(jobs)

    def ended(self, *jobs):
        until(lambda: all(self.last(which) is not None for which in jobs))
        return [self.last(which) for which in jobs]

    def last(self, which):
        """Its error or its finish reason; None while it goes on."""
        news = self.news.get(which, [Delta()])[-1]
        return news.finish_reason if isinstance(news, Delta) else news

    def whole(self, which):
        total = Delta()
        for delta in self.news[which]:
            total.extend(delta)
        return total

    def count(self, name, **labels):
        return self.metrics.registry.get_sample_value(name, labels)


@contextmanager
def engine(session, **settings):
    running = Running(session, **settings)
    running.engine.start()
    try:
        yield running
    finally:
        running.engine.stop()


def expect_whole(running, which):
    prompt, limit = which.sequence.prompt, which.sequence.limit
    delta = running.whole(which)
    assert delta.text == decode([token_of(prompt, i) for i in range(limit)])
    assert delta.exit_layers == [layer_of(prompt, i) for i in range(limit)]
    assert delta.confidences == [confidence_of(prompt, i) for i in range(limit)]
    assert delta.finish_reason == "length" and delta.statistics.layers_run > 0


def test_sequences_of_all_lengths_get_their_own_tokens():
    jobs = [job([7 + n] * (n % 5 + 1), limit=n % 7 + 1) for n in range(40)]
    with engine(FakeSession(slots=3, per_step=2)) as running:
        running.submit(*jobs[:20])
        running.submit(*jobs[20:])
        running.ended(*jobs)
        for which in jobs:
            expect_whole(running, which)
        assert running.engine.running == running.engine.waiting == 0 and running.session.running == []
        generated = sum(running.count("nemo_ee_generated_tokens_total", exit_layer=str(n)) for n in (2, 4, 8))
        assert generated == sum(which.sequence.limit for which in jobs)
        assert running.count("nemo_ee_time_to_first_token_seconds_count") == 40
        assert running.count("nemo_ee_inter_token_seconds_count") == generated - 40
        assert running.count("nemo_ee_prompt_tokens_total") == sum(which.prompt_tokens for which in jobs)


def test_new_sequences_join_running_ones_within_the_prefill_budget():
    session = FakeSession(slots=4, step_seconds=0.01)
    first, later = job([7], limit=200), [job([8] * 6, limit=10) for _ in range(4)]
    long = job([9] * 30, limit=10)
    with engine(session, prefill_tokens=12) as running:
        running.submit(first)
        until(lambda: session.steps > 2)
        running.submit(*later, long)
        running.ended(*later, long)
        assert running.last(first) is None, "it went on meanwhile"
    assert session.added == [(1, 1), (2, 12), (1, 6), (1, 6), (1, 30)], (
        "two fit the budget, then one the slots, …"
    )


def test_the_queue_takes_all_of_a_request_or_none():
    session = FakeSession(slots=1, step_seconds=0.01)
    with engine(session, queue_size=3) as running:
        first = job([7], limit=500)
        running.submit(first)
        until(lambda: running.engine.running == 1)
        running.submit(job([8]), job([8]))
        with pytest.raises(ApiError, match="2 sequences wait already") as caught:
            running.submit(job([9]), job([9]))
        assert caught.value.status == 429 and caught.value.retry_after_s >= 1
        assert running.engine.waiting == 2
        assert running.count("nemo_ee_queue_depth") == 2 and running.count("nemo_ee_running_sequences") == 1
        running.submit(job([9]))


def test_cancelled_sequences_leave_queue_and_session():
    session = FakeSession(slots=1, step_seconds=0.005)
    with engine(session) as running:
        first, second, third = job([7], limit=10_000), job([8]), job([9])
        running.submit(first, second, third)
        until(lambda: session.steps > 2)
        second.cancelled = first.cancelled = True
        running.ended(third)
        assert session.removed == [first.sequence]
        assert second not in running.news and running.last(first) is None, "nobody is told"


def test_time_is_up_in_the_queue_and_in_the_session():
    session = FakeSession(slots=1, step_seconds=0.005)
    with engine(session) as running:
        first, second = job([7], limit=10_000, timeout=0.2), job([8], timeout=0.05)
        running.submit(first, second)
        late, unserved = running.ended(first, second)
        assert (late.status, unserved.status) == (504, 504)
        assert "while generating" in late.message and "while waiting" in unserved.message
        assert session.removed == [first.sequence]


@pytest.mark.parametrize("cut", [0, 1], ids=["whole tokens", "inside a token"])
def test_stop_strings_end_a_sequence(cut):
    prompt = [7, 8]
    words = [token_of(prompt, i) for i in range(6)]
    session = FakeSession(per_step=3)
    with engine(session) as running:
        stop = decode(words[2:4])
        which = job(prompt, limit=20, stop=[stop[: len(stop) - cut]])
        running.submit(which)
        assert running.ended(which) == ["stop"]
        delta = running.whole(which)
        assert delta.text == decode(words[:2]) and len(delta.exit_layers) == len(delta.pieces) == 4
        until(lambda: session.running == [])
        assert session.removed == [], "the session knows that it has ended"


def test_a_stop_string_that_the_end_completes_is_the_reason():
    """The last token is an unfinished character, which waits for more and shows only at the end."""
    with engine(FakeSession(token=lambda prompt, i: 9)) as running:
        which = job([7], limit=3, stop=[UNFINISHED])
        which.sequence.text = TextStream(lambda ids: UNFINISHED * len(ids), [], [UNFINISHED])
        running.submit(which)
        assert running.ended(which) == ["stop"] and running.whole(which).text == ""


def test_eos_ends_a_sequence():
    session = FakeSession(token=lambda prompt, i: EOS if i == 3 else 9)
    with engine(session) as running:
        which = job([7], limit=9)
        running.submit(which)
        assert running.ended(which) == ["stop"]
        assert len(running.whole(which).pieces) == 4 and session.removed == []


def test_a_failure_ends_what_runs_and_nothing_else(caplog):
    session = FakeSession(slots=2, step_seconds=0.01)
    with engine(session) as running:
        lost, queued = [job([7], limit=500), job([8], limit=500)], [job([9]), job([10])]
        running.submit(*lost, *queued)
        until(lambda: session.steps > 1)
        session.fail = RuntimeError("out of memory")
        errors = running.ended(*lost)
        assert [error.status for error in errors] == [500, 500]
        running.ended(*queued)
        for which in queued:
            expect_whole(running, which)
        assert running.engine.state == "ok" and running.count("nemo_ee_engine_failures_total") == 1
    assert "out of memory" in caplog.text


def test_failures_in_a_row_end_the_engine():
    class Broken(FakeSession):
        def add(self, sequences):
            if sequences[0].prompt != PROBE:
                raise RuntimeError("no prefill")
            return super().add(sequences)

    with engine(Broken()) as running:
        for n in range(MAX_FAILURES):
            assert running.engine.state == "ok"
            which = job([7 + n])
            running.submit(which)
            assert running.ended(which)[0].status == 500
        until(lambda: running.engine.state == "failed")
        with pytest.raises(ApiError, match="failed") as caught:
            running.submit(job([7]))
        assert caught.value.status == 503


def test_failures_that_are_not_in_a_row_do_not_end_the_engine():
    """Requests of one token are done when they have joined; there is no step between."""

    class Fickle(FakeSession):
        def add(self, sequences):
            if sequences[0].prompt == [7]:
                raise RuntimeError("no prefill")
            return super().add(sequences)

    with engine(Fickle()) as running:
        for _ in range(MAX_FAILURES + 1):
            bad, good = job([7]), job([8], limit=1)
            for which, outcome in ((bad, "engine_failure"), (good, "length")):
                running.submit(which)
                (end,) = running.ended(which)
                assert getattr(end, "code", end) == outcome
        assert running.engine.state == "ok"


def test_a_session_that_cannot_be_opened_is_told_at_the_start():
    @contextmanager
    def open_session():
        raise MemoryError(OPEN)
        yield

    running = Running(FakeSession(), open_session=open_session)
    with pytest.raises(MemoryError, match=OPEN):
        running.engine.start()
    assert running.engine.state == "failed"


def test_draining_finishes_what_it_can_and_cuts_the_rest():
    session = FakeSession(slots=1, step_seconds=0.01)
    with engine(session) as running:
        short, long, never = job([7], limit=5), job([8], limit=10_000), job([9])
        running.submit(short, long, never)
        running.engine.drain(0.5)
        with pytest.raises(ApiError, match="draining"):
            running.submit(job([10]))
        assert running.ended(short) == ["length"]
        assert [error.status for error in running.ended(long, never)] == [503, 503]
        assert running.engine.state == "draining" and session.running == []


def test_stopping_ends_everything_at_once():
    session = FakeSession(slots=1, step_seconds=0.01)
    with engine(session) as running:
        jobs = [job([7], limit=10_000), job([8])]
        running.submit(*jobs)
        until(lambda: session.steps > 1)
        running.engine.stop()
        assert [error.status for error in running.ended(*jobs)] == [503, 503]
        assert running.engine.state == "stopped" and not any(
            t.name == "engine" for t in threading.enumerate()
        )


def test_retry_after_grows_with_the_queue():
    session = FakeSession(slots=1, step_seconds=0.05)
    with engine(session, queue_size=8) as running:
        running.submit(job([7], limit=1000), *[job([8]) for _ in range(7)])
        until(lambda: running.engine.running == 1)
        running.submit(job([9]))
        with pytest.raises(ApiError) as caught:
            running.submit(job([9]))
        assert caught.value.headers() == {"Retry-After": "8"}
