# Copyright (c) 2026 The nemo_ee authors. Licensed under the Apache License, Version 2.0.
"""First weights of exits: by copy, at random, or in closed form, and how well that fits.

Nothing that is stepped by an optimizer.
"""
