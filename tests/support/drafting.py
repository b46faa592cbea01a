# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A policy that drafts whether it pays or not, so that all of lossless decoding is run."""

import random
from unittest.mock import patch

from nemo_ee.decoding.leaving import is_asked
from nemo_ee.decoding.policy.exit_policy import ExitPolicy, Round


class EagerDrafts(ExitPolicy):
    """Rounds of 1 to 4 drafts from an exit, both at random; now and then a token at full depth."""

    def __init__(self, prices, exit_layers, drafts=None, seed=0):
        super().__init__(prices, exit_layers, drafts)
        self.random = random.Random(seed)

    def draft(self, rows):
        exits = [k for k in range(len(self.layers)) if any(is_asked(row[k]) for row in rows)]
        if not exits or self.random.random() < 0.1:
            return None
        return Round(self.random.choice(exits), self.random.randint(1, 4))


def drafting_eagerly():
    """A context in which sessions draft so by themselves."""
    return patch("nemo_ee.decoding.session.ExitPolicy", EagerDrafts)
