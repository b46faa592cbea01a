# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""lm-evaluation-harness over a model with early exits: its language model, tasks without a hub, a sweep of thresholds.

Only this package imports `lm_eval`, which comes with the extra `lm-eval`.
"""
