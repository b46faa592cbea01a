# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Over four stages a token takes the time to its exit's stage, on stages whose passes are sleeps.

Two cores have no room for four stages that compute; four that sleep need none. Messages between them are real.
"""

import itertools
import statistics
import time

import pytest
import torch

from tests.support.tiny_gpt import HEADS

STAGES, UNIT, TOKENS = 4, 0.1, 14
WAYS = {1: dict(threshold=0.0, exits=[1]), 2: dict(threshold=0.0, exits=[4]), STAGES: False}
"""Stages that a token passes -> options: exits on the first, on the second, none."""
SLOWER = 1.45
"""Than its share of full depth's time: the tiny model's own work, which on a busy machine delays the first stage
by what the others do meanwhile. Waiting for all stages would be 4 and 2 times the share."""


def token_times(unit):
    """Way -> seconds at which this rank's sequence got each token; empty behind the first stage."""
    from nemo_ee.decoding.generated_sequence import GeneratedSequence
    from nemo_ee.decoding.pipeline.stage import Stage
    from tests.support.tiny_gpt import tiny_model, tiny_model_config

    config = tiny_model_config(
        head=HEADS["norm, tied"], exits=[1, 4], pp=STAGES, share_embeddings_and_output_weights=False
    )
    model, run, commit, found = tiny_model(config, STAGES), Stage.run, GeneratedSequence.commit, {}

    def slow_run(stage, tokens, hidden):
        time.sleep(unit)
        return run(stage, tokens, hidden)

    for way, early_exit in WAYS.items():
        times = found[way] = []

        def noted(sequence, *answer, times=times):
            times.append(time.perf_counter())
            return commit(sequence, *answer)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stage, "run", slow_run)
            patch.setattr(GeneratedSequence, "commit", noted)
            lengths = dict(max_length=TOKENS, min_length=TOKENS)
            model.generate(["w1 w2 w3"], lengths, dict(add_BOS=False), early_exit=early_exit)
    return found if torch.distributed.get_rank() == 0 else {}


def test_a_token_takes_the_time_to_its_exits_stage(workers):
    times = workers(STAGES).run(token_times, UNIT, timeout=300)[0]
    between = {}
    for stages, found in times.items():
        assert len(found) == TOKENS
        gaps = [after - before for before, after in itertools.pairwise(found)]
        between[stages] = statistics.median(gaps[1:])  # the first waits for the prompt on all stages
        print(
            f"{stages} of {STAGES} stages: {1000 * between[stages]:.0f} ms a token, {1000 * UNIT:.0f} ms a pass"
        )
    for stages, seconds in between.items():
        assert stages * UNIT <= seconds < SLOWER * stages / STAGES * between[STAGES]
