# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""A training run's folder, checkpoints and ends.

Nothing of what is learned in it.
"""
