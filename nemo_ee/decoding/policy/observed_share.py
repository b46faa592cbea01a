# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""How often something happens, as seen so far."""

from math import sqrt

WEIGHT, MEMORY, FORGET = 3.0, 100.0, 0.01
"""Observations that the prior is worth. Observations that count: older ones fade, so that a text may change. How far
those fade that are not renewed, so that what is not tried any more is tried again."""


class Share:
    """How often something happens, as seen so far; `prior` is expected before."""

    def __init__(self, prior: float):
        self._prior, self._yes, self._all = prior, prior * WEIGHT, WEIGHT

    @property
    def mean(self) -> float:
        """Expected."""
        return self._yes / self._all

    @property
    def hoped(self) -> float:
        """A standard error above `mean`."""
        return self.mean + sqrt(self.mean * (1 - self.mean) / self._all)

    def observe(self, yes: int, of: int) -> None:
        """Counts what happened."""
        fade = min(1.0, MEMORY / (self._all + of))
        self._yes, self._all = (self._yes + yes) * fade, (self._all + of) * fade

    def forget(self, steps: int = 1) -> None:
        """Goes a little towards what was expected before, as of so many steps without an observation."""
        part = min(1.0, FORGET * steps)
        self._yes += part * (self._prior * WEIGHT - self._yes)
        self._all += part * (WEIGHT - self._all)
