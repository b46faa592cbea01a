# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""What Prometheus is told."""

import threading
import time
from collections import Counter as Counts
from collections import deque
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

RATE_SECONDS = 10.0
"""Over how long tokens per second are averaged."""
FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
BETWEEN_TOKENS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters and histograms of one server, in a registry of its own; any thread may call."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "nemo_ee_requests", "Requests that ended, by outcome.", ["endpoint", "outcome"], registry=registry
        )
        self._generated = Counter(
            "nemo_ee_generated_tokens", "Tokens generated, by exit layer.", ["exit_layer"], registry=registry
        )
        self._prompt = Counter("nemo_ee_prompt_tokens", "Prompt tokens read.", registry=registry)
        self._layers = Counter(
            "nemo_ee_layers_run",
            "Passes of one token through one layer, of sequences that ended.",
            registry=registry,
        )
        self._drafts = Counter(
            "nemo_ee_drafts",
            "Drafted tokens of sequences that ended (lossless).",
            ["result"],
            registry=registry,
        )
        self._first_token = Histogram(
            "nemo_ee_time_to_first_token_seconds",
            "From a sequence's acceptance to its first token, waiting included.",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self._between_tokens = Histogram(
            "nemo_ee_inter_token_seconds",
            "Between a sequence's tokens; several of one step share its time.",
            buckets=BETWEEN_TOKENS_BUCKETS,
            registry=registry,
        )
        self._failures = Counter("nemo_ee_engine_failures", "Failures of the engine.", registry=registry)
        self._not_finite = Counter(
            "nemo_ee_not_finite_sequences",
            "Sequences ended as their predictions were NaN or infinite.",
            registry=registry,
        )
        self._recent: deque[tuple[float, int]] = deque()
        self._recent_lock = threading.Lock()
        rate = f"Tokens generated per second, over the last {RATE_SECONDS:.0f} s."
        Gauge("nemo_ee_tokens_per_second", rate, registry=registry).set_function(self.tokens_per_second)

    def watch(self, queue_depth: Callable[[], int], running: Callable[[], int]) -> None:
        """Adds gauges that are read whenever Prometheus asks."""
        waiting = Gauge("nemo_ee_queue_depth", "Sequences that wait for a slot.", registry=self.registry)
        waiting.set_function(queue_depth)
        now = Gauge("nemo_ee_running_sequences", "Sequences that are decoded.", registry=self.registry)
        now.set_function(running)

    def request(self, endpoint: str, outcome: str) -> None:
        """A request has ended."""
        self._requests.labels(endpoint, outcome).inc()

    def prompt(self, tokens: int) -> None:
        """Prompts were read."""
        self._prompt.inc(tokens)

    def tokens(self, exit_layers: Iterable[int]) -> None:
        """Tokens were generated."""
        counts = Counts(exit_layers)
        for layer, count in counts.items():
            self._generated.labels(str(layer)).inc(count)
        with self._recent_lock:
            self._recent.append((time.monotonic(), counts.total()))
            self._forget()

    def first_token(self, seconds: float) -> None:
        """A sequence has its first token."""
        self._first_token.observe(seconds)

    def between_tokens(self, seconds: float, count: int) -> None:
        """A sequence has `count` more tokens, after some seconds."""
        for _ in range(count):
            self._between_tokens.observe(seconds / count)

    def ended(self, layers_run: int, drafts: int, accepted: int) -> None:
        """A sequence has ended."""
        self._layers.inc(layers_run)
        self._drafts.labels("accepted").inc(accepted)
        self._drafts.labels("rejected").inc(drafts - accepted)

    def engine_failure(self) -> None:
        """The engine failed, and with it what ran."""
        self._failures.inc()

    def not_finite(self) -> None:
        """A sequence was ended, as its predictions were NaN or infinite."""
        self._not_finite.inc()

    def tokens_per_second(self) -> float:
        """Over the last `RATE_SECONDS`."""
        with self._recent_lock:
            self._forget()
            return sum(count for _, count in self._recent) / RATE_SECONDS

    def text(self) -> bytes:
        """In Prometheus's format."""
        return generate_latest(self.registry)

    def _forget(self) -> None:
        oldest = time.monotonic() - RATE_SECONDS
        while self._recent and self._recent[0][0] < oldest:
            self._recent.popleft()
