# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""Training stops at a loss that is no number: every weight would be none after the step."""

import math
from collections.abc import Mapping

from nemo_ee.errors import TrainingError


def require_finite(losses: Mapping[int, float], step: int, validation: bool = False) -> None:
    """Looks at losses that all ranks know; so all of them stop alike.

    With half precision gradients may overflow: the loss scaler skips such a step, and that is no fault. A loss is in
    float32 and not scaled.

    Args:
        losses: exit layer, 0 for the final exit -> its loss, or whatever is NaN or infinite where that is.
        step: the optimizer step that they are of, from 1; of a validation, the steps before it.
        validation: whether they are a validation's.

    Raises:
        TrainingError: naming the exits; checkpoints stay as they are.
    """
    bad = {n: value for n, value in losses.items() if not math.isfinite(value)}
    if not bad:
        return
    names = ", ".join("the final exit" if n == 0 else f"exit {n}" for n in sorted(bad))
    when = f"validation after step {step}" if validation else f"step {step}"
    raise TrainingError(
        f"{when}: the loss of {names} is {next(iter(bad.values()))}; what was saved before stays: go on from it with a "
        "lower model.optim.lr, or leave out the data of this step"
    )
