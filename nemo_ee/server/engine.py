# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The thread that owns the model: new sequences join those that run between two steps."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from nemo_ee.decoding.generated_sequence import GeneratedSequence
from nemo_ee.server.answers.delta import Delta
from nemo_ee.server.answers.errors import ApiError
from nemo_ee.server.job import Job
from nemo_ee.server.metrics import Metrics
from nemo_ee.server.probe import Decodes, NotFiniteError, check_finite

MAX_FAILURES = 3
"""Failures in a row, without prompts and steps between that succeeded, after which the engine gives up."""
LONGEST_RETRY_S = 60
STOP_SECONDS = 30.0
"""How long a step that is under way may take when the engine is stopped."""

Event = tuple[Job, Delta | Exception]
logger = logging.getLogger("nemo_ee.server")


class Session(Decodes, Protocol):
    """What the engine needs of `nemo_ee.decoding.session.DecodingSession`."""

    @property
    def free(self) -> int: ...

    def remove(self, sequence: GeneratedSequence) -> None: ...


class Engine:
    """Queues jobs, runs them in a session, and hands out what comes of them.

    Jobs join in the order they came. One that is cancelled or late leaves between two steps; so does one whose
    predictions are not finite, and if the model then has none that are, or else if the session fails, jobs that run
    fail with it, and the next ones get a new session.

    Args:
        open_session: a context manager that makes a session, entered on the engine's thread.
        slots: of the session.
        prefill_tokens: prompt tokens that join between two steps, at most; a longer prompt joins alone.
        queue_size: jobs that wait, at most.
        metrics: is told of all that happens.
        deliver: takes what has come of jobs, on the engine's thread; by default it goes to their replies.
    """

    def __init__(
        self,
        open_session: Callable[[], AbstractContextManager[Session]],
        slots: int,
        prefill_tokens: int,
        queue_size: int,
        metrics: Metrics,
        deliver: Callable[[list[Event]], None] | None = None,
    ):
        self._open_session, self._slots, self._prefill_tokens = open_session, slots, prefill_tokens
        self._queue_size, self._metrics, self._deliver = queue_size, metrics, deliver or to_replies
        self._changed = threading.Condition()  # guards the next four
        self._waiting: deque[Job] = deque()
        self._cut_at = math.inf
        self._stopping = False
        self._state = "starting"
        self._running: dict[GeneratedSequence, Job] = {}
        self._failures, self._error = 0, None  # type: int, Exception | None
        self._doubtful = False  # a job had predictions that were not finite
        self._job_seconds = 1.0  # how long a job occupies its slot, averaged
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.watch(lambda: self.waiting, lambda: self.running)

    @property
    def state(self) -> str:
        """ "starting", "ok", "draining", "failed", "not_finite" (failed, as the model has only NaN) or "stopped"."""
        return self._state

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs in the session."""
        return len(self._running)

    def start(self) -> None:
        """Opens the first session.

        Raises:
            Exception: what opening it raised.
        """
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._state != "starting")
        if self._error is not None:
            raise self._error

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues all jobs of a request, or none. Any thread.

        Raises:
            ApiError: 429 if the queue is full, 503 if nothing is accepted any more.
        """
        with self._changed:
            if self._state != "ok":
                text = f"{_what_is(self._state)}; nothing is accepted"
                raise ApiError(503, text, code=self._state)
            if len(self._waiting) + len(jobs) > self._queue_size:
                text = f"{len(self._waiting)} sequences wait already, and the queue holds {self._queue_size}; try later"
                raise ApiError(429, text, code="queue_full", retry_after_s=self._retry_after())
            self._waiting.extend(jobs)
            self._changed.notify_all()

    def drain(self, seconds: float) -> None:
        """Accepts nothing any more; what is queued or runs may go on for some seconds. Any thread."""
        with self._changed:
            self._cut_at = time.monotonic() + seconds
            if self._state == "ok":
                self._state = "draining"
            self._changed.notify_all()

    def stop(self) -> None:
        """Ends the thread, and with 503 what is left. Blocks until the step under way is done. Any thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        try:
            while self._try_session():
                pass
        finally:
            failed = "not_finite" if isinstance(self._error, NotFiniteError) else "failed"
            self._enter("stopped" if self._stopping else failed)
            with self._changed:
                left = [*self._running.values(), *self._waiting]
                self._running, self._waiting = {}, deque()
            self._deliver([(job, _gone("stopping" if self._stopping else failed)) for job in left])

    def _try_session(self) -> bool:
        """Opens a session and works with it; returns whether it failed and another is to be tried."""
        try:
            with self._open_session() as session:
                self._check(session)
                self._enter("ok")
                self._work(session)
                return False
        except Exception as error:
            self._error = error
            if self._state == "starting":
                return False
            logger.exception("the engine failed; %d running sequences are lost", len(self._running))
            self._metrics.engine_failure()
            self._failures += 1
            lost, self._running = list(self._running.values()), {}
            text = "the engine failed; the server's log says why"
            self._deliver([(job, ApiError(500, text, code="engine_failure")) for job in lost])
            return self._failures < MAX_FAILURES

    def _check(self, session: Session) -> None:
        """Raises NotFiniteError for a model that has no finite predictions for anything."""
        check_finite(session)
        self._doubtful = False

    def _enter(self, state: str) -> None:
        with self._changed:
            if state != "ok" or self._state == "starting":
                self._state = state
            self._changed.notify_all()

    def _work(self, session: Session) -> None:
        while self._has_work():
            self._drop(session)
            joining = self._pick(session.free)
            if not joining and not self._running:
                continue  # all that waited has left
            if joining:
                self._running |= {job.sequence: job for job in joining}
                session.add([job.sequence for job in joining])
                self._metrics.prompt(sum(job.prompt_tokens for job in joining))
                self._collect(session, joining)
            if self._running:
                session.step()
                self._collect(session, list(self._running.values()))
            if self._doubtful:
                self._check(session)
            self._failures = 0

    def _has_work(self) -> bool:
        """Waits for work; False when the engine is stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._stopping)
            return not self._stopping

    def _drop(self, session: Session) -> None:
        """Takes out jobs that are cancelled, late or cut off."""
        now = time.monotonic()
        leaving = [job for job in self._running.values() if self._must_leave(job, now)]
        for job in leaving:
            session.remove(job.sequence)
            del self._running[job.sequence]
        with self._changed:
            unserved = [job for job in self._waiting if self._must_leave(job, now)]
            for job in unserved:
                self._waiting.remove(job)
        self._deliver([(job, self._reason(job, now)) for job in leaving + unserved if not job.cancelled])

    def _must_leave(self, job: Job, now: float) -> bool:
        return job.cancelled or now >= min(job.deadline, self._cut_at)

    def _reason(self, job: Job, now: float) -> ApiError:
        if now < job.deadline:
            return _gone("stopping")
        where = "waiting" if job.started is None else "generating"
        return ApiError(
            504, f"the request's time was up while {where}; ask for less, or try later", code="timeout"
        )

    def _pick(self, free: int) -> list[Job]:
        """The jobs that join now, out of the queue."""
        picked: list[Job] = []
        tokens, now = 0, time.monotonic()
        with self._changed:
            while self._waiting and len(picked) < free:
                tokens += self._waiting[0].prompt_tokens
                if picked and tokens > self._prefill_tokens:
                    break
                picked.append(self._waiting.popleft())
                picked[-1].started = now
        return picked

    def _collect(self, session: Session, jobs: Iterable[Job]) -> None:
        """Hands out what is new of some jobs; those that have ended are forgotten."""
        events: list[Event] = []
        try:
            for job in jobs:
                if not job.is_finite:
                    events.append((job, self._take_out(session, job)))
                    continue
                delta = job.advance()
                if delta is None:
                    continue
                events.append((job, delta))
                if delta.finish_reason is not None:
                    del self._running[job.sequence]
                self._measure(job, delta)
        finally:
            self._deliver(events)

    def _take_out(self, session: Session, job: Job) -> ApiError:
        """Ends a job whose predictions are not finite; the others go on."""
        del self._running[job.sequence]
        session.remove(job.sequence)
        self._doubtful = True
        self._metrics.not_finite()
        logger.error("predictions for a sequence are NaN or infinite; it is ended")
        text = "the model's predictions for this prompt are NaN or infinite"
        return ApiError(500, text, code="not_finite")

    def _measure(self, job: Job, delta: Delta) -> None:
        now, count = time.monotonic(), len(delta.pieces)
        if count:
            self._metrics.tokens(delta.exit_layers)
            if job.last_token is None:
                self._metrics.first_token(now - job.accepted)
            else:
                self._metrics.between_tokens(now - job.last_token, count)
            job.last_token = now
        if delta.statistics is not None and job.started is not None:
            self._metrics.ended(
                delta.statistics.layers_run, delta.statistics.drafts, delta.statistics.accepted
            )
            self._job_seconds += 0.1 * (now - job.started - self._job_seconds)

    def _retry_after(self) -> int:
        seconds = self._job_seconds * len(self._waiting) / self._slots
        return max(1, min(LONGEST_RETRY_S, math.ceil(seconds)))


def to_replies(events: list[Event]) -> None:
    """Hands events to their jobs' replies, on the event loop, in one call."""
    if events and not (loop := events[0][0].reply.loop).is_closed():
        loop.call_soon_threadsafe(_hand_out, events)


def _hand_out(events: list[Event]) -> None:
    for job, news in events:
        if isinstance(news, Delta):
            job.reply.put(job.index, news)
        else:
            job.reply.fail(news)


def _gone(state: str) -> ApiError:
    return ApiError(503, f"{_what_is(state)}; the request was cut", code=state)


def _what_is(state: str) -> str:
    return (
        "the model's predictions are NaN or infinite" if state == "not_finite" else f"the server is {state}"
    )
