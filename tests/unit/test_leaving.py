# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""The rule by which tokens leave: strictly above a threshold, and never at 1.0, of whatever type the numbers are."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import nemo_ee
from nemo_ee.calibration.exit_decisions import first_exits
from nemo_ee.decoding.leaving import NEVER, is_asked, leaves
from nemo_ee.evaluation.teacher_forced import ExitScores, TextScores

ROUNDED = float(np.float32(0.3))
"""Above 0.3, and equal to it in float32."""
CASES = [
    (0.5, 0.5, False),
    (math.nextafter(0.5, 1), 0.5, True),
    (0.0, 0.0, False),
    (1e-30, 0.0, True),
    (1.0, math.nextafter(1, 0), True),
    (1.0, 1.0, False),
    (1.0 + 1e-7, 1.0, False),
    (ROUNDED, 0.3, True),
    (math.nan, 0.0, False),
]


@pytest.mark.parametrize("confidence, threshold, expected", CASES)
def test_strictly_above_and_never_at_one(confidence, threshold, expected):
    assert leaves(confidence, threshold) is expected and is_asked(threshold) is (threshold < NEVER)
    assert first_exits(np.array([[confidence]]), [threshold]).tolist() == [0 if expected else 1]
    dtype = torch.float32 if confidence == ROUNDED else torch.float64
    exit_ = ExitScores(torch.tensor([[7]]), torch.tensor([[confidence]], dtype=dtype), None, None)
    final = ExitScores(torch.tensor([[9]]), None, None, None)
    tokens, layers = TextScores(final, {4: exit_}).leaving({4: threshold})
    assert (tokens.item(), layers.item()) == ((7, 4) if expected else (9, 0))


def test_no_other_file_compares_with_a_threshold():
    found = {}
    for path in sorted(Path(nemo_ee.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Lt | ast.Gt | ast.LtE | ast.GtE):
                words = ast.unparse(node).lower()
                if "threshold" in words or "never" in words.split():
                    found.setdefault(path.name, []).append(words)
    assert found.keys() == {"leaving.py"}, found
