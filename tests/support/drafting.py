# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A drafting policy that drafts whether it pays or not, so that all of lossless decoding is run."""

import random
from unittest.mock import patch

from nemo_ee.decoding.drafts.drafting import DraftingPolicy, Round


class EagerDrafts(DraftingPolicy):
    """Rounds of 1 to 4 drafts from an exit, both at random; now and then a token at full depth."""

    def __init__(self, costs, seed=0):
        super().__init__(costs)
        self.random = random.Random(seed)

    def next(self, sequences, exits):
        if not exits:
            return None
        if self.random.random() < 0.1:
            return None
        return Round(self.random.choice(list(exits)), self.random.randint(1, 4))


def drafting_eagerly():
    """A context in which sessions draft so by themselves."""
    return patch("nemo_ee.decoding.session.DraftingPolicy", EagerDrafts)
