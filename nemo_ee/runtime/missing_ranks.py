# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Which rank was missed, when a collective fails or times out: a process that was killed, stopped or cut off.

Every rank counts in the store that the process group was brought up with, from a thread of its own. So a rank
that waits for another one still counts, and one that does not count is gone.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from nemo_ee.errors import RankMissingError

PERIOD = 0.5
"""Seconds between two counts."""

PATIENCE = 4.0
"""Seconds that a rank may take to count, and the store to answer, once something failed."""

SILENCE = 60.0
"""Seconds without a count after which rank 0 says so, while everything still waits."""

ENDED = "ended"
"""In place of the count of a rank that has left by itself."""

FOUND = "missing"
"""Where the rank that first finds out writes who is missing, for those that still wait."""

FAILED = "failed"
"""Where a rank that ends with an error writes which, for those that wait for it."""

REMEDY = (
    "out of memory, a node that failed, or a process that hangs; the same command goes on from the last "
    "checkpoint. How long the others wait is model.distributed_timeout_minutes"
)


@contextmanager
def naming_missing_ranks(children: Sequence[subprocess.Popen] = ()) -> Iterator[None]:
    """Within, a failed collective becomes an error that names the ranks that no longer answer.

    Collective over the world at its begin: a barrier. Without torch.distributed or others it does nothing.

    Args:
        children: the processes of ranks 1, 2, ... where this one started them. They are ended with a failure.

    Raises:
        RankMissingError: instead of torch.distributed's error, where a rank is missing, or has ended with an error.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    counting = _Counting(children)
    try:
        yield
    except BaseException as error:
        missing, told = {}, ""
        if _is_of_a_collective(error):
            told = counting.failure_elsewhere()
            missing = {} if told else counting.find_missing()
        elif isinstance(error, Exception):
            counting.tell_failure(error)
        counting.end()
        for child in children:
            child.send_signal(signal.SIGKILL)
        if missing or told:
            raise RankMissingError(told or describe(missing)) from error
        raise
    counting.end()


def describe(missing: dict[int, str]) -> str:
    """The message for users; `missing`: rank -> what is known of it."""
    ranks = ", ".join(f"rank {rank} ({known})" for rank, known in sorted(missing.items()))
    return f"{ranks}: no answer; {REMEDY}"


def _is_of_a_collective(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _own_connection() -> dist.Store:
    """To the default group's store: a thread that waits for it does not hold up the others."""
    store = dist.distributed_c10d._get_default_store()
    if hasattr(store, "clone"):
        return store.clone()
    # torch 2.7: there a prefix, which tells torchrun's attempts apart, cannot be read.
    whole = store._underlying_non_prefix_store
    if not isinstance(whole, dist.TCPStore):
        return store
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    other = dist.TCPStore(whole.host, whole.port, wait_for_workers=False, timeout=store.timeout)
    return dist.PrefixStore(f"attempt {attempt}", other)


class _Counting:
    """This rank's count and its view of the others'."""

    def __init__(self, children: Sequence[subprocess.Popen]):
        self.rank, self.world, self.children = dist.get_rank(), dist.get_world_size(), children
        self.store = dist.PrefixStore("nemo_ee/counts", _own_connection())
        self.store.set(f"host {self.rank}", socket.gethostname())
        self.store.set(str(self.rank), "0")
        dist.barrier()  # afterwards all keys are there
        self.hosts = [self.store.get(f"host {rank}").decode() for rank in range(self.world)]
        self._ended, self._told, self._found = threading.Event(), set[int](), dict[int, str]()
        self._thread = threading.Thread(target=self._count, daemon=True, name="rank-count")
        self._thread.start()
        for rank, child in enumerate(children, 1):
            threading.Thread(target=self._attend, args=(rank, child), daemon=True).start()

    def _attend(self, rank: int, child: subprocess.Popen) -> None:
        """Says that a child was killed as soon as it was: Lightning, which looks every five seconds, then kills all."""
        if (code := child.wait()) < 0 and not self._ended.is_set():
            self._tell({rank: _ending(code)})

    def end(self) -> None:
        """Leaves: others are not to miss this rank."""
        self._ended.set()
        self._within_patience(lambda: self.store.set(str(self.rank), ENDED))

    def tell_failure(self, error: Exception) -> None:
        """Leaves this rank's error to those that wait for it."""
        text = f"rank {self.rank} on {self.hosts[self.rank]} has ended with {type(error).__name__}: {error}"
        self._within_patience(lambda: self.store.set(FAILED, text))

    def failure_elsewhere(self) -> str:
        """What another rank has left; empty if nothing."""
        told = self._within_patience(lambda: self.store.check([FAILED]) and self.store.get(FAILED).decode())
        return str(told or "")

    def find_missing(self) -> dict[int, str]:
        """Rank -> what is known of it, of all that do not count any more. Takes `PATIENCE` seconds or some."""
        missing = self._found or self._dead_children() or self._silent()
        if missing:
            self._within_patience(lambda: self.store.set(FOUND, json.dumps(missing)))
            if self.rank == 0:
                time.sleep(PATIENCE)  # the others hear of it while the store is there
        return missing

    def _silent(self) -> dict[int, str]:
        first = self._within_patience(self._counts)
        if first is not None:
            time.sleep(PATIENCE)
            second = self._within_patience(self._counts)
        if self._found:
            return self._found
        if first is None or second is None:
            return {0: f"on {self.hosts[0]}, where the ranks met"}
        silent = [r for r in range(self.world) if first[r] == second[r] != ENDED and r != self.rank]
        return {rank: f"on {self.hosts[rank]}" for rank in silent}

    def _count(self) -> None:
        count, seen = 0, {rank: ("", time.monotonic()) for rank in range(self.world)}
        while not self._ended.wait(PERIOD):
            count += 1
            try:
                self.store.set(str(self.rank), str(count))
                if self.store.check([FOUND]):
                    self._found = {int(r): known for r, known in json.loads(self.store.get(FOUND)).items()}
                if self.rank == 0:
                    self._watch(seen)
            except Exception:  # the store went with rank 0; collectives will fail, and find_missing says so
                return

    def _watch(self, seen: dict[int, tuple[str, float]]) -> None:
        now = time.monotonic()
        for rank, value in enumerate(self._counts()):
            if value != seen[rank][0] or value == ENDED:
                seen[rank] = (value, now)
        silent = {
            rank: f"on {self.hosts[rank]}, since {now - at:.0f} s"
            for rank, (_, at) in seen.items()
            if now - at > SILENCE
        }
        self._tell({**silent, **self._dead_children()})

    def _tell(self, found: dict[int, str]) -> None:
        if found.keys() - self._told:
            self._told |= found.keys()
            print(f"\nerror: {describe(found)}", file=sys.stderr, flush=True)  # behind a progress bar

    def _counts(self) -> list[str]:
        return [self.store.get(str(rank)).decode() for rank in range(self.world)]

    def _dead_children(self) -> dict[int, str]:
        codes = {rank: child.poll() for rank, child in enumerate(self.children, 1)}
        return {rank: _ending(code) for rank, code in codes.items() if code is not None and code < 0}

    @staticmethod
    def _within_patience(work: Callable) -> object:
        """What `work` returns; None if it fails or takes too long: a stopped store answers nothing at all."""
        results: list = []

        def attempt() -> None:
            try:
                results.append(work())
            except Exception:
                return

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        return results[0] if results else None


def _ending(code: int) -> str:
    return f"ended by {signal.Signals(-code).name} on {os.uname().nodename}"
